"""What ours is compared with: loaders and trainers of others, by their public interfaces."""
