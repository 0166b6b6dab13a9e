"""Bridges to other people's training loops. Each module needs its library only where its callback is made."""
