"""Starting jobs: the demo, and launchers for one machine and many."""
