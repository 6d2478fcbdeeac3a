package resealv1

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestVisible(t *testing.T) {
	for text, want := range map[string]string{
		"":                          "",
		"Zürich, 東京, 🙂\u200d🙂":      "Zürich, 東京, 🙂\u200d🙂",
		"\x1b[2J\a\x00\x7f\r":       `\x1b[2J\x07\x00\u007f\r`,
		"\u009b31m\u0085":           `\u009b31m\u0085`,
		"a\u202eb\u2066c\u200f":     `a\u202eb\u2066c\u200f`,
		"\u2028\ufeff\u200b\u00ad":  `\u2028\ufeff\u200b\u00ad`,
		"\U000e0041":                `\U000e0041`,
		"no UTF-8: \x9b \xe2\x80 é": `no UTF-8: \x9b \xe2\x80 é`,
		"one\ttwo\nthree":           `one\ttwo\nthree`,
	} {
		if got := Visible(text); got != want {
			t.Errorf("Visible(%q) = %q, want %q", text, got, want)
		}
		if Legible(text) != (text == want) || !Legible(want) {
			t.Errorf("Legible(%q) = %v, of what Visible makes of it: %v", text, Legible(text), Legible(want))
		}
	}
	if got := VisibleLines("one\ttwo\n\x1b"); got != "one\ttwo\n\\x1b" {
		t.Errorf("VisibleLines: %q", got)
	}
}
