"""Tensors in files, whoever wrote them: safetensors, shards, and what torch.save makes."""
