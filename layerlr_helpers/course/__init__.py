"""What only the course needs: its data, its figures, its pretrained network, and running its notebooks."""
