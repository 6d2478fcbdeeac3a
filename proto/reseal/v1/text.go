package resealv1

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Legible says whether text may be shown to people as it is: valid UTF-8 without
// characters that steer a terminal or hide text, as Visible escapes them. The
// empty text is legible.
func Legible(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, steers)
}

// Visible makes text legible: control characters of C0 and C1, DEL, line
// separators and characters that change the direction of writing or have no width
// are escaped as in a Go string, such as \n, \x1b and \u202e, and so are bytes
// that aren't UTF-8.
func Visible(text string) string { return visible(text, "") }

// VisibleLines is Visible for texts of several lines: newlines and tabs stay.
func VisibleLines(text string) string { return visible(text, "\n\t") }

func visible(text, keep string) string {
	if Legible(text) {
		return text
	}
	var b strings.Builder
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, text[0])
		case !steers(r), strings.ContainsRune(keep, r):
			b.WriteRune(r)
		default:
			b.WriteString(escape(r))
		}
		text = text[size:]
	}
	return b.String()
}

func escape(r rune) string {
	switch {
	case r == '\n':
		return `\n`
	case r == '\r':
		return `\r`
	case r == '\t':
		return `\t`
	case r < ' ':
		return fmt.Sprintf(`\x%02x`, r)
	case r <= 0xffff:
		return fmt.Sprintf(`\u%04x`, r)
	}
	return fmt.Sprintf(`\U%08x`, r)
}

// steers says whether a character acts on a terminal, or on the order in which
// others are shown, instead of being shown.
func steers(r rune) bool {
	const nonJoiner, joiner = '\u200c', '\u200d' // words of some languages need them
	return r < ' ' || r >= 0x7f && r != nonJoiner && r != joiner && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}
