"""Binary-coding fits with power-of-two scales and the layer-wise solver that turns a weight into shift-add codes."""
