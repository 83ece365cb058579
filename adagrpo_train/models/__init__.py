"""Flow models behind one seam."""
