"""The tiny pretrained models of the demos, and the scripts that made them."""
