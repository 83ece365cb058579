"""Charts as inline SVG: drawn once for a wide page and once for a phone, since scaled text would be unreadable."""
