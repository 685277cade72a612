"""A real pair on two cores: a pretrained model and an adapter with known behaviours, its data and how it was made."""
