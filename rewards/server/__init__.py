"""A reward behind a socket: one process, one model, one device, one port."""
