package main

import (
	"bytes"
	"fmt"
	"io"
	"unicode/utf16"
	"unicode/utf8"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// visibleWriter is what all output goes through: what edges, backends and others
// wrote is shown, and never steers the terminal. Each write holds whole
// characters.
type visibleWriter struct{ w io.Writer }

func (v *visibleWriter) Write(p []byte) (int, error) {
	if text := resealv1.VisibleLines(string(p)); len(text) != len(p) {
		if _, err := io.WriteString(v.w, text); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return v.w.Write(p)
}

// steer writes text of this command's own that may steer the terminal.
func steer(w io.Writer, text string) {
	if v, ok := w.(*visibleWriter); ok {
		w = v.w
	}
	_, _ = io.WriteString(w, text)
}

// writeJSON writes a document of JSON as the same one that is visible throughout.
func (a *app) writeJSON(data []byte) error {
	var out bytes.Buffer
	for len(data) > 0 {
		r, size := utf8.DecodeRune(data)
		switch shown := resealv1.VisibleLines(string(data[:size])); {
		case len(shown) == size:
			out.Write(data[:size])
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
		data = data[size:]
	}
	_, err := a.out.Write(out.Bytes())
	return err
}
