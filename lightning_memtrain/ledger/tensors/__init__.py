"""Where the tensors are: in what users make, in storages, in the buffers of several processes."""
