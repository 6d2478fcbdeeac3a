package backend

import (
	"testing"

	"golang.org/x/net/http2"
)

// A backend may name a parameter twice in its SETTINGS; the last value is in force
// (RFC 9113 section 6.5.3).
func TestRepeatedH2Settings(t *testing.T) {
	s := serveRaw(t, func(c *serverConn) {
		answered := 0
		h2Until(func(f *http2.Framer, frame http2.Frame) bool {
			if answered == 0 {
				f.WriteSettings(
					http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0},
					http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 10}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 4096},
				)
				answered++
			}
			answers("ok", true)(f, frame)
			return false
		})(c)
	})
	s.tls.NextProtos = []string{"h2"}
	x := newBench(t, []string{s.addr})
	for range 3 {
		if got := x.get("/"); got != "ok" {
			t.Fatalf("%q", got)
		}
	}
	if n := s.opened.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}
