"""What happens to weights after training: checkpoints on disk, exports, imports."""
