"""The bus: how either side talks to the broker, behind one small seam."""
