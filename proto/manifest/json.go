package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// writeJSON writes a tree of mappings, sequences and scalars.
func writeJSON(w *bytes.Buffer, n *yaml.Node, indent string) {
	switch n.Kind {
	case yaml.MappingNode:
		writeJSONGroup(w, "{}", len(n.Content)/2, indent, func(i int, indent string) {
			writeJSONText(w, n.Content[2*i].Value)
			w.WriteString(": ")
			writeJSON(w, n.Content[2*i+1], indent)
		})
	case yaml.SequenceNode:
		writeJSONGroup(w, "[]", len(n.Content), indent, func(i int, indent string) {
			writeJSON(w, n.Content[i], indent)
		})
	default:
		if n.Tag == "!!str" {
			writeJSONText(w, n.Value)
			return
		}
		w.WriteString(n.Value)
	}
}

// writeJSONGroup writes what an object and an array have in common.
func writeJSONGroup(w *bytes.Buffer, brackets string, count int, indent string, item func(i int, indent string)) {
	if count == 0 {
		w.WriteString(brackets)
		return
	}
	inner := indent + "  "
	w.WriteByte(brackets[0])
	for i := range count {
		if i > 0 {
			w.WriteByte(',')
		}
		w.WriteString("\n" + inner)
		item(i, inner)
	}
	w.WriteString("\n" + indent)
	w.WriteByte(brackets[1])
}

// writeJSONText writes a string. Characters that are not printable are escaped,
// since YAML, which JSON is read back as, does not allow all of them.
func writeJSONText(w *bytes.Buffer, text string) {
	var encoded bytes.Buffer
	encoder := json.NewEncoder(&encoded)
	encoder.SetEscapeHTML(false)
	// A string always encodes.
	_ = encoder.Encode(text)
	for _, r := range strings.TrimSuffix(encoded.String(), "\n") {
		switch {
		case unicode.IsPrint(r):
			w.WriteRune(r)
		case r < 0x10000:
			fmt.Fprintf(w, `\u%04x`, r)
		default:
			r -= 0x10000
			fmt.Fprintf(w, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		}
	}
}

// yamlEscapes rewrites what JSON allows in strings and the YAML parser does not
// take, or takes for a line break: surrogate pairs, "\/" and characters that are
// not printable. The rest of the text stays as it is.
func yamlEscapes(data []byte) []byte {
	out := make([]byte, 0, len(data))
	for at := 0; at < len(data); {
		r, size := utf8.DecodeRune(data[at:])
		high, low := escapeAt(data, at), escapeAt(data, at+6)
		switch {
		case 0xd800 <= high && high < 0xdc00 && 0xdc00 <= low && low < 0xe000:
			out = fmt.Appendf(out, `\U%08x`, 0x10000+(high-0xd800)<<10+(low-0xdc00))
			size = 12
		case bytes.HasPrefix(data[at:], []byte(`\/`)):
			out = append(out, '/')
			size = 2
		case r == '\\' && at+1 < len(data):
			// The character after goes along: it may be a backslash itself.
			out = append(out, data[at:at+2]...)
			size = 2
		case r > '~' && !unicode.IsPrint(r):
			out = fmt.Appendf(out, `\U%08x`, r)
		default:
			out = append(out, data[at:at+size]...)
		}
		at += size
	}
	return out
}

// escapeAt reads an escape of the form \uXXXX, 0 when there is none.
func escapeAt(data []byte, at int) rune {
	if at+6 > len(data) || data[at] != '\\' || data[at+1] != 'u' {
		return 0
	}
	value, err := strconv.ParseUint(string(data[at+2:at+6]), 16, 32)
	if err != nil {
		return 0
	}
	return rune(value)
}
