package framing

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// message is a request as a backend sees it.
type message struct {
	method, target, body string
}

func (m message) String() string { return fmt.Sprintf("%s %s %.60q", m.method, m.target, m.body) }

// same reports whether two messages are one request that came two ways. A target in
// absolute form may have become one in origin form.
func (m message) same(other message) bool {
	return m.method == other.method && m.body == other.body && origin(m.target) == origin(other.target)
}

func origin(target string) string {
	for _, scheme := range []string{"http://", "https://"} {
		if rest, ok := strings.CutPrefix(target, scheme); ok {
			if slash := strings.IndexByte(rest, '/'); slash >= 0 {
				return rest[slash:]
			}
			return "/"
		}
	}
	return target
}

// canonical reads requests that no two readers can take for different ones: only what
// RFC 9112 has senders write, and of that only what leaves nothing to interpretation.
// It returns what is left when the last of them is not whole yet, and an error when
// some reader could see something else.
func canonical(raw []byte) (whole []message, rest []byte, err error) {
	for len(raw) > 0 {
		end := bytes.Index(raw, []byte("\r\n\r\n"))
		if end < 0 {
			return whole, raw, canonicalLines(raw[:bytes.LastIndexByte(raw, '\n')+1])
		}
		head, body := raw[:end+2], raw[end+4:]
		m, framing, err := canonicalHead(head)
		if err != nil {
			return whole, raw, err
		}
		content, after, err := canonicalBody(framing, body)
		if err != nil {
			if errors.Is(err, errPartial) {
				return whole, raw, nil
			}
			return whole, raw, err
		}
		m.body = content
		whole, raw = append(whole, m), after
	}
	return whole, nil, nil
}

var errPartial = errors.New("not whole yet")

// canonicalLines checks that lines end in CRLF and hold nothing that could end them
// elsewhere.
func canonicalLines(lines []byte) error {
	for line := range bytes.Lines(lines) {
		text, ok := bytes.CutSuffix(line, []byte("\r\n"))
		if !ok {
			return fmt.Errorf("line %q does not end in CRLF", line)
		}
		for _, b := range text {
			if b < ' ' && b != '\t' || b == 0x7f {
				return fmt.Errorf("line %q has a control character", text)
			}
		}
	}
	return nil
}

const unframed, chunked = -1, -2

// canonicalHead reads a head. framing is the length of the body, unframed or chunked.
func canonicalHead(head []byte) (m message, framing int, err error) {
	if err := canonicalLines(head); err != nil {
		return m, 0, err
	}
	lines := strings.Split(strings.TrimSuffix(string(head), "\r\n"), "\r\n")
	parts := strings.Split(lines[0], " ")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] != "HTTP/1.1" || strings.ContainsRune(lines[0], '\t') {
		return m, 0, fmt.Errorf("request line %q", lines[0])
	}
	m.method, m.target = parts[0], parts[1]
	framing = unframed
	hosts := 0
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" || strings.Trim(strings.ToLower(name), "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") != "" {
			return m, 0, fmt.Errorf("field %q", line)
		}
		value = strings.Trim(value, " \t")
		switch lower := strings.ToLower(name); {
		case lower == "host":
			hosts++
		case lower == "content-length":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil || framing != unframed || strconv.FormatInt(n, 10) != value || n < 0 {
				return m, 0, fmt.Errorf("field %q", line)
			}
			framing = int(n)
		case lower == "transfer-encoding":
			if framing != unframed || !strings.EqualFold(value, "chunked") {
				return m, 0, fmt.Errorf("field %q", line)
			}
			framing = chunked
		}
	}
	if hosts != 1 {
		return m, 0, fmt.Errorf("%d Host fields", hosts)
	}
	return m, framing, nil
}

// canonicalBody reads a body.
func canonicalBody(framing int, raw []byte) (content string, rest []byte, err error) {
	switch {
	case framing == unframed:
		return "", raw, nil
	case framing >= 0:
		if len(raw) < framing {
			return "", nil, errPartial
		}
		return string(raw[:framing]), raw[framing:], nil
	}
	var whole strings.Builder
	for {
		end := bytes.IndexByte(raw, '\n')
		if end < 0 {
			return "", nil, errPartial
		}
		line, ok := strings.CutSuffix(string(raw[:end+1]), "\r\n")
		if !ok || line == "" || len(line) > 15 || strings.Trim(strings.ToLower(line), "0123456789abcdef") != "" {
			return "", nil, fmt.Errorf("chunk size %q", raw[:end+1])
		}
		size, _ := strconv.ParseInt(line, 16, 64)
		raw = raw[end+1:]
		if size == 0 {
			rest, err := canonicalTrailers(raw)
			return whole.String(), rest, err
		}
		if int64(len(raw)) < size+2 {
			return "", nil, errPartial
		}
		if string(raw[size:size+2]) != "\r\n" {
			return "", nil, fmt.Errorf("%q after a chunk", raw[size:size+2])
		}
		whole.Write(raw[:size])
		raw = raw[size+2:]
	}
}

// framers are fields that have no place among trailers (RFC 9110 section 6.5.1).
var framers = []string{"content-length", "transfer-encoding", "host"}

// canonicalTrailers reads what stands after the last chunk.
func canonicalTrailers(raw []byte) (rest []byte, err error) {
	for {
		end := bytes.IndexByte(raw, '\n')
		if end < 0 {
			return nil, errPartial
		}
		line := raw[:end+1]
		if err := canonicalLines(line); err != nil {
			return nil, err
		}
		raw = raw[end+1:]
		if len(line) == 2 {
			return raw, nil
		}
		name, _, ok := strings.Cut(string(line), ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t") || slices.Contains(framers, strings.ToLower(name)) {
			return nil, fmt.Errorf("trailer %q", line)
		}
	}
}
