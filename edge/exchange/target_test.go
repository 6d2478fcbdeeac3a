package exchange

import (
	"strings"
	"testing"
)

func TestHostName(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "App.Test": "app.test", "app.test.": "app.test", "app.test:443": "app.test", "app.test.:": "app.test",
		"[2001:DB8::1]:443": "2001:db8::1", "[::1]": "::1", "10.0.0.1:80": "10.0.0.1", "a_b.test": "a_b.test",
		"::1": "!", ":443": "!", "[::1": "!", "[10.0.0.1]": "!", "[::1%25eth0]": "!", "a b": "!", "a/b": "!", "a@b": "!", "a:x": "!", "a:1:2": "!", "[::1]x": "!",
	} {
		got, ok := HostName(in)
		if !ok {
			got = "!"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func FuzzHostName(f *testing.F) {
	f.Add("App.test.:443")
	f.Add("[::1]:1")
	f.Fuzz(func(t *testing.T, host string) {
		name, ok := HostName(host)
		if ok && strings.ContainsAny(name, "[]/@ \t\r\nABCDEFGHIJKLMNOPQRSTUVWXYZ") {
			t.Errorf("%q became %q", host, name)
		}
	})
}

func TestSplitTarget(t *testing.T) {
	for in, want := range map[string]string{
		"/": "/", "*": "*", "/a?b": "/a?b", "//a": "//a", "http://x": "/", "https://x/": "/", "http://x?q": "/?q", "http://x:1/a%2Fb|c?d": "/a%2Fb|c?d",
	} {
		if _, _, got := SplitTarget(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestValidOrigin(t *testing.T) {
	for _, good := range []string{"/", "//", "/a%2Fb?c=%", "/\xc3\xa9", "/a?b?c", "/a|b"} {
		if !ValidOrigin(good) {
			t.Errorf("%q is refused", good)
		}
	}
	for _, bad := range []string{"", "a", "*", "/%", "/%2", "/%2x", "/a b", "/a\tb", "/a#b", "/?a#b", "/\x7f", "/\x00"} {
		if ValidOrigin(bad) {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestNameOf(t *testing.T) {
	for name, want := range map[string]Name{
		"HOST": Host, "content-length": ContentLength, "Transfer-Encoding": TransferEncoding, "te": TE, "Trailer": Trailer, "uPgrade": Upgrade,
		"Keep-Alive": Hop, "connection": Connection, "HTTP2-Settings": Hop, "Proxy-Authorization": Hop, "Proxy-Connection": Hop, "Proxy-Authenticate": Hop,
		"Expect": Expect, "Hose": OtherName, "Content_Length": OtherName, "": OtherName,
	} {
		if got := NameOf(name); got != want {
			t.Errorf("%q: %d, want %d", name, got, want)
		}
	}
	if Removable("Cookie") || Removable("x-Forwarded-For") || !Removable("X-Hop") {
		t.Error("what Connection may remove")
	}
}

func TestValidValue(t *testing.T) {
	for c := range 256 {
		for at := range 20 {
			text := []byte(strings.Repeat("\xff~", 10))
			text[at] = byte(c)
			if got, want := ValidValue(string(text)), c == '\t' || c >= ' ' && c != 0x7f; got != want {
				t.Fatalf("%#x at %d: %v", c, at, got)
			}
		}
	}
}
