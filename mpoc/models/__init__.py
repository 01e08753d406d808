"""Networks: the zoo, networks that a user names, shape tracing, loading and export."""
