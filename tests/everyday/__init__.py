"""What people meet every day: models, tasks, runs and mistakes as they are found in other people's projects, tried end to end.

The tests beside the modules say what each part does.
"""
