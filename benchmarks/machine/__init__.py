"""What the kernels' machine code says: its instructions by pipe, and the times that follow from them on paper."""
