//! The file as written. One module per version of the format; `reader` is what they share.

pub(crate) mod reader;
pub(crate) mod v1;
