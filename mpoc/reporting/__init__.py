"""Reports of a compressed file: rows and totals, JSON schemas, HTML, SVG and PNG."""
