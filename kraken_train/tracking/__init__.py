"""A run's copy in Weights & Biases or TensorBoard, made by a process of its own from what the run leaves on disk.

Training only appends to metrics.jsonl and events.jsonl. `process.py` starts `follow.py`, which reads these two
(`tail.py`) and what else the run folder says (`described.py`), and gives them to `wandb_copy.py` or
`tensorboard_copy.py`. So a service that is slow, full or out of reach slows down and stops nothing, and whatever a
copy lacks can be added from the files at any later time.
"""
