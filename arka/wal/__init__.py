"""The write-ahead log: segments, group commit and recovery. FORMAT.md beside this file is normative."""
