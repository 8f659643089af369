"""What several mixers and layers are made of, beside attention's parts."""
