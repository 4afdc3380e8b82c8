"""What is measured, and how. Everything compared is run in turns, in one process, on the same inputs."""
