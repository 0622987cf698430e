//! Additional header segments (RFC 7143 §11.2.2).

use bytes::Bytes;
use nom::bytes::complete::take;
use nom::combinator::all_consuming;
use nom::multi::many0;
use nom::number::complete::{be_u8, be_u16, be_u32};
use nom::{IResult, Parser};

use crate::error::Error;
use crate::frame::padding;

/// The longest CDB (SPC-5 §4.2.4: a variable length CDB has at most 260 bytes).
pub const MAX_CDB_LEN: usize = 260;

const EXTENDED_CDB: u8 = 1;
const BIDI_READ_LENGTH: u8 = 2;

/// What the additional header segments of a SCSI Command say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ahs {
    /// The whole CDB, when it is longer than 16 bytes.
    pub extended_cdb: Option<Bytes>,
    /// Bidirectional Read Expected Data Transfer Length in bytes.
    pub bidi_read_edtl: Option<u32>,
}

impl Ahs {
    /// Reads the segments that follow a header whose CDB field is `cdb`. Segments of unknown type are skipped.
    ///
    /// # Errors
    /// [`Error::MalformedAhs`]: lengths that contradict each other, a CDB that is too short or too long, a repeated
    /// segment.
    pub fn parse(segments: &[u8], cdb: &[u8; 16]) -> Result<Self, Error> {
        let mut ahs = Self::default();
        if segments.is_empty() {
            return Ok(ahs);
        }
        let (_, segments) = all_consuming(many0(segment))
            .parse(segments)
            .map_err(|_: nom::Err<()>| Error::MalformedAhs)?;
        for (kind, specific) in segments {
            match kind & 0x3f {
                EXTENDED_CDB => ahs.take_cdb(cdb, specific)?,
                BIDI_READ_LENGTH => ahs.take_bidi_length(specific)?,
                _ => {}
            }
        }
        Ok(ahs)
    }

    /// `specific` is a reserved byte and the rest of the CDB: AHSLength = CDBLength - 15.
    fn take_cdb(&mut self, cdb: &[u8; 16], specific: &[u8]) -> Result<(), Error> {
        let [_reserved, rest @ ..] = specific else {
            return Err(Error::MalformedAhs);
        };
        if rest.is_empty() || cdb.len() + rest.len() > MAX_CDB_LEN || self.extended_cdb.is_some() {
            return Err(Error::MalformedAhs);
        }
        self.extended_cdb = Some([cdb.as_slice(), rest].concat().into());
        Ok(())
    }

    fn take_bidi_length(&mut self, specific: &[u8]) -> Result<(), Error> {
        let (_, (_reserved, length)) = all_consuming((be_u8, be_u32))
            .parse(specific)
            .map_err(|_: nom::Err<()>| Error::MalformedAhs)?;
        match self.bidi_read_edtl.replace(length) {
            None => Ok(()),
            Some(_) => Err(Error::MalformedAhs),
        }
    }
}

fn segment(i: &[u8]) -> IResult<&[u8], (u8, &[u8]), ()> {
    let (i, (len, kind)) = (be_u16, be_u8).parse(i)?;
    let (i, specific) = take(len).parse(i)?;
    let (i, _padding) = take(padding(3 + usize::from(len))).parse(i)?;
    Ok((i, (kind, specific)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CDB: [u8; 16] = [0x7f; 16];

    #[test]
    fn reads_an_extended_cdb_of_32_bytes() {
        let mut segments = vec![0, 17, 1, 0];
        segments.extend(1..=16);
        let ahs = Ahs::parse(&segments, &CDB).unwrap();
        let cdb = ahs.extended_cdb.unwrap();
        assert_eq!(cdb.len(), 32);
        assert_eq!(cdb[15..18], [0x7f, 1, 2]);
        assert_eq!(ahs.bidi_read_edtl, None);
    }

    #[test]
    fn reads_both_and_skips_unknown_and_padding() {
        let segments = [
            0, 5, 2, 0, 0, 0, 2, 0, 0, 3, 9, 1, 2, 3, 0, 0, 0, 2, 1, 0, 0xaa, 0, 0, 0,
        ];
        let ahs = Ahs::parse(&segments, &CDB).unwrap();
        assert_eq!(ahs.bidi_read_edtl, Some(512));
        assert_eq!(ahs.extended_cdb.map(|cdb| (cdb.len(), cdb[16])), Some((17, 0xaa)));
    }

    #[test]
    fn refuses_contradictions() {
        for bad in [
            &[0, 1, 1, 0][..],                                 // extended CDB of 16 bytes
            &[0, 0, 1, 0],                                     // not even the reserved byte
            &[0, 9, 1, 0],                                     // longer than what is there
            &[0, 5, 2, 0, 0, 0, 2, 0, 0, 5, 2, 0, 0, 0, 2, 0], // twice
            &[0, 3, 2, 0, 0, 0, 0, 0],                         // bidirectional length of 2 bytes
        ] {
            assert_eq!(Ahs::parse(bad, &CDB), Err(Error::MalformedAhs), "{bad:?}");
        }
        let mut long = vec![0, 246, 1, 0];
        long.extend([0; 245 + 3]);
        assert_eq!(
            Ahs::parse(&long, &CDB),
            Err(Error::MalformedAhs),
            "CDB of 261 bytes"
        );
    }
}
