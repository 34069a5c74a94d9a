"""The cases behind docs/benchmarks.md, one file a subject, and the page that they fill."""
