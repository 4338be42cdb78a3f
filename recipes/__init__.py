"""Recipes that train and evaluate quantized spiking networks on the paper's benchmarks."""
