"""Search over ways to prune: what varies, trials as jobs in folders, and who runs them."""
