package exchange

// The characters of tokens, names of fields and methods (RFC 9110 section 5.6.2),
// as bits: those below 64, and those from there on.
const (
	tokenLow uint64 = 1<<'!' | 1<<'#' | 1<<'$' | 1<<'%' | 1<<'&' | 1<<'\'' | 1<<'*' | 1<<'+' | 1<<'-' | 1<<'.' |
		(1<<10-1)<<'0'
	tokenHigh uint64 = 1<<('^'-64) | 1<<('_'-64) | 1<<('`'-64) | 1<<('|'-64) | 1<<('~'-64) |
		(1<<26-1)<<('A'-64) | (1<<26-1)<<('a'-64)
)

func tokenByte(c byte) bool {
	if c < 64 {
		return tokenLow>>c&1 != 0
	}
	return c < 128 && tokenHigh>>(c-64)&1 != 0
}

// ValidToken reports whether text is a token.
func ValidToken(text string) bool {
	for i := range len(text) {
		if !tokenByte(text[i]) {
			return false
		}
	}
	return text != ""
}

// ValidValue reports whether text may be the value of a field: it has no control
// character other than HTAB (RFC 9110 section 5.5). CR and LF are control
// characters.
func ValidValue(text string) bool {
	for ; len(text) >= 8; text = text[8:] {
		// Eight at a time: most bytes of a head are in values.
		word := uint64(text[0]) | uint64(text[1])<<8 | uint64(text[2])<<16 | uint64(text[3])<<24 |
			uint64(text[4])<<32 | uint64(text[5])<<40 | uint64(text[6])<<48 | uint64(text[7])<<56
		if suspicious(word) && !plain(text[:8]) {
			return false
		}
	}
	return plain(text)
}

// suspicious reports whether one of the bytes of word may be below 0x20 or 0x7f.
// Of words without such a byte it reports false, unless they hold one above 0x7f.
func suspicious(word uint64) bool {
	const ones, tops = 0x0101010101010101, 0x8080808080808080
	return ((word-ones*0x20)|(word+ones))&tops != 0
}

func plain(text string) bool {
	for i := range len(text) {
		if c := text[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// TrimSpace cuts off the whitespace around a value, or an element of a list (RFC
// 9110 section 5.6.3).
func TrimSpace(text string) string {
	for text != "" && (text[0] == ' ' || text[0] == '\t') {
		text = text[1:]
	}
	for text != "" && (text[len(text)-1] == ' ' || text[len(text)-1] == '\t') {
		text = text[:len(text)-1]
	}
	return text
}
