"""What training takes, known before it starts: memory, communication, time, and the best way to use a cluster."""
