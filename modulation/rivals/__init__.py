"""What neuron modulation is compared with: steering vectors and scaled layers, and one rule to set them."""
