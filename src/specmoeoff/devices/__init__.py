"""Where projections, routers, experts and some attention run: this host's kernels, or torch."""
