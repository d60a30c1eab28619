//! How byte-level vocabularies spell bytes: visible Latin-1 characters stand for themselves, all other bytes for the code
//! points from U+0100 on, in order (a space is `Ġ`).

const FIRST_CODE: u32 = 0x100;

fn is_visible(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

pub(super) fn char_of(byte: u8) -> char {
    if is_visible(byte) {
        return char::from(byte);
    }
    let hidden_before = (0..byte).filter(|&earlier| !is_visible(earlier));
    let code = hidden_before.fold(FIRST_CODE, |code, _| code + 1);
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

pub(super) fn byte_of(character: char) -> Option<u8> {
    match u32::from(character).checked_sub(FIRST_CODE) {
        None => u8::try_from(character)
            .ok()
            .filter(|&byte| is_visible(byte)),
        Some(index) => {
            let mut hidden = (0..=u8::MAX).filter(|&byte| !is_visible(byte));
            hidden.nth(index as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character_and_every_character_one_byte() {
        let characters: String = (0..=u8::MAX).map(char_of).collect();
        let bytes: Vec<u8> = characters.chars().filter_map(byte_of).collect();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<u8>>());
        assert_eq!(
            (char_of(b' '), char_of(b'\n'), char_of(b'A')),
            ('Ġ', 'Ċ', 'A')
        );
        assert_eq!((byte_of(' '), byte_of('中')), (None, None));
    }
}
