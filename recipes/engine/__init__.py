"""The training engine all recipes share: Lightning's Trainer with the few parts it lacks."""
