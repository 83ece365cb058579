"""How a trainer asks for scores: the reward in its own process, or behind sockets, by one seam."""
