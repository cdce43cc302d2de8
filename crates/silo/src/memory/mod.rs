//! Machine memory: memfd, userfaultfd, tracking and fault service.
