package framing

import "testing"

func TestCanonical(t *testing.T) {
	const head = "POST /a HTTP/1.1\r\nHost: a\r\n"
	good := []struct {
		raw   string
		whole int
		rest  string
	}{
		{"", 0, ""},
		{head + "\r\n", 1, ""},
		{head + "\r\n" + head + "X: y", 1, head + "X: y"},
		{head + "Content-Length: 5\r\n\r\nhello" + head + "\r\n", 2, ""},
		{head + "Content-Length: 5\r\n\r\nhel", 0, head + "Content-Length: 5\r\n\r\nhel"},
		{head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + head + "\r\n", 2, ""},
		{head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n", 1, ""},
	}
	for _, test := range good {
		whole, rest, err := canonical([]byte(test.raw))
		if err != nil || len(whole) != test.whole || string(rest) != test.rest {
			t.Errorf("%q: %v, rest %q, %v", test.raw, whole, rest, err)
		}
	}
	bad := []string{
		"POST /a HTTP/1.1\nHost: a\n\n\r\n\r\n", "POST /a  HTTP/1.1\r\nHost: a\r\n\r\n", "POST /a HTTP/1.0\r\nHost: a\r\n\r\n", "POST /a HTTP/1.1\r\n\r\n", head + "Host: b\r\n\r\n",
		head + "X: a\rb\r\n\r\n", head + "X: a\x00\r\n\r\n", head + "X : a\r\n\r\n", head + " X: a\r\n\r\n", head + "X\r\n\r\n",
		head + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", head + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", head + "Content-Length: +5\r\n\r\nhello",
		head + "Content-Length: 05\r\n\r\nhello", head + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", head + "Transfer-Encoding: identity\r\n\r\n",
		head + "Transfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n0\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
		head + "Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", head + "Transfer-Encoding: chunked\r\n\r\n0\r\n\n",
		"POST /a HTTP/1.1\r\nHost: a\nX: y",
	}
	for _, raw := range bad {
		if whole, _, err := canonical([]byte(raw)); err == nil {
			t.Errorf("%q was read as %v", raw, whole)
		}
	}
}
