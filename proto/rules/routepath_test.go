package rules

import (
	"strings"
	"testing"
)

func TestRoutePath(t *testing.T) {
	for in, want := range map[string][2]string{
		"": {"/", "/"}, "*": {"/", "/"}, "/": {"/", "/"}, "/a": {"/a", "/a"}, "/a/": {"/a/", "/a/"},
		"/%61dmin": {"/admin", "/admin"}, "/caf%c3%a9": {"/caf%C3%A9", "/caf%C3%A9"}, "/café": {"/caf%C3%A9", "/caf%C3%A9"},
		"/a%20b": {"/a%20b", "/a%20b"}, "/a|b": {"/a%7Cb", "/a%7Cb"}, "/a%3Ab;c=%40": {"/a:b;c=@", "/a:b;c=@"},
		"/a%2fb": {"/a%2Fb", "/a/b"}, "/a%5cb": {"/a%5Cb", "/a/b"}, "/a%252Fb": {"/a%252Fb", "/a%252Fb"},
		"//a//b": {"//a//b", "/a/b"}, "/a/../b": {"/a/../b", "/b"}, "/a/%2e%2E/b": {"/a/../b", "/b"}, "/a/..": {"/a/..", "/"},
		"/a/.": {"/a/.", "/a/"}, "/../..": {"/../..", "/"}, "/a/..;x=1/b": {"/a/..;x=1/b", "/b"}, "/a/..%2Fb": {"/a/..%2Fb", "/b"},
		"/a//../b": {"/a//../b", "/b"}, "/.a": {"/.a", "/.a"}, "/a/...": {"/a/...", "/a/..."}, "/a/b/..": {"/a/b/..", "/a/"},
		"/%00": {"/%00", "/%00"},
	} {
		plain, strict, err := RoutePath(in)
		if err != nil || plain != want[0] || strict != want[1] {
			t.Errorf("%q: %q, %q, %v, want %q", in, plain, strict, err, want)
		}
	}
	for _, in := range []string{"/%", "/%a", "/%zz", "/a#b"} {
		if plain, _, err := RoutePath(in); err == nil {
			t.Errorf("%q: %q", in, plain)
		}
	}
}

func FuzzRoutePath(f *testing.F) {
	f.Add("/a/%2e./b%2F|c")
	f.Fuzz(func(t *testing.T, path string) {
		plain, strict, err := RoutePath(path)
		if err != nil {
			return
		}
		again, same, err := RoutePath(plain)
		if err != nil || again != plain || same != strict {
			t.Fatalf("%q: %q, then %q and %q for %q, %v", path, plain, again, same, strict, err)
		}
		if end, further, err := RoutePath(strict); err != nil || end != strict || further != strict {
			t.Fatalf("%q: %q isn't settled: %q %q %v", path, strict, end, further, err)
		}
		if strings.Contains(strict+"/", "/../") || strings.Contains(strict, "//") || !strings.HasPrefix(strict, "/") {
			t.Fatalf("%q: %q", path, strict)
		}
	})
}
