"""Text to memory-mapped token shards in Megatron's indexed format."""
