"""What fastref costs, tracked over its history, and against ``torch.distributed.rpc`` in the same run."""
