package frontend

import (
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestHTTP2Floods: a client that sends more of what costs us than of requests is
// told to calm down, and others don't notice.
func TestHTTP2Floods(t *testing.T) {
	const frames = 5000
	for name, flood := range map[string]func(h *h2Raw, i uint32) error{
		// CVE-2023-44487: the client resets what it asked for.
		"rapid reset": func(h *h2Raw, i uint32) error {
			_ = h.request(2*i+1, "GET", true)
			return h.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
		},
		// CVE-2025-8671: it has the server do so, in each way that is a stream error.
		"made you reset by length": func(h *h2Raw, i uint32) error {
			_ = h.request(2*i+1, "POST", false, "content-length", "5")
			return h.WriteData(2*i+1, true, []byte("longer than that"))
		},
		"made you reset by window": func(h *h2Raw, i uint32) error {
			_ = h.request(2*i+1, "POST", false)
			return h.WriteWindowUpdate(2*i+1, 1<<31-1)
		},
		"made you reset by header": func(h *h2Raw, i uint32) error {
			return h.request(2*i+1, "GET", true, "connection", "close")
		},
		"too many streams": func(h *h2Raw, i uint32) error { return h.request(2*i+1, "POST", false) },
		"PING":             func(h *h2Raw, i uint32) error { return h.WritePing(false, [8]byte{}) },
		"SETTINGS":         func(h *h2Raw, i uint32) error { return h.WriteSettings() },
		"PRIORITY": func(h *h2Raw, i uint32) error {
			return h.WritePriority(2*i+1, http2.PriorityParam{StreamDep: 2*i + 3})
		},
		"WINDOW_UPDATE": func(h *h2Raw, i uint32) error { return h.WriteWindowUpdate(0, 1) },
		"unknown":       func(h *h2Raw, i uint32) error { return h.WriteRawFrame(0xbe, 0, 0, nil) },
		"empty DATA": func(h *h2Raw, i uint32) error {
			if i == 0 {
				_ = h.request(1, "POST", false)
			}
			return h.WriteData(1, false, nil)
		},
		// CVE-2024-27316 and its kind.
		"empty CONTINUATION": func(h *h2Raw, i uint32) error {
			if i == 0 {
				return h.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.fields("GET")})
			}
			return h.WriteContinuation(1, false, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var arrived atomic.Int64
			e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
				if r.URL.Path == "/legit" {
					return textResponse(200, "ok"), nil
				}
				arrived.Add(1)
				if r.Body != nil {
					if _, err := io.Copy(io.Discard, r.Body); err != nil {
						return nil, err
					}
				}
				<-r.Context().Done()
				return nil, r.Context().Err()
			}})
			legit := e.client(true)
			get := func() {
				t.Helper()
				response := must[*http.Response](t)(legit.Get("https://app.test/legit"))
				bodyOf(t, response)
			}
			get()
			began, h := time.Now(), e.h2Dial()
			ended := make(chan *h2End, 1)
			go func() { ended <- h.read(nil) }()
			for i := range uint32(frames) {
				if flood(h, i) != nil {
					break // it is ended
				}
				if i%250 == 0 {
					get()
				}
			}
			// What we still send can make TCP throw away the GOAWAY, so that it may be
			// missing, but not say anything else.
			if end := <-ended; end.goAway && end.code != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("GOAWAY %v", end.code)
			}
			// Those that were under way when the credit was used up come on top.
			if n, most := arrived.Load(), floodCredit+floodRefill*time.Since(began).Seconds()+250; float64(n) > most {
				t.Errorf("%d requests went to the upstream, want at most %.0f", n, most)
			}
			get()
			c := e.count("main")
			eventually(t, "the flood is counted once and all else has ended", func() bool {
				return read(c, func(c *counts) bool { return c.errors["http2_flood"] == 1 && c.opened == c.gone+1 })
			})
		})
	}
}

// TestFloodIsToldToCalm sends just enough, so that TCP does not drop the GOAWAY.
func TestFloodIsToldToCalm(t *testing.T) {
	e := newEdge(t, answering("ok"))
	h := e.h2Dial()
	for range 3 * floodCredit {
		if err := h.WritePing(false, [8]byte{}); err != nil {
			break
		}
	}
	if end := h.read(func(end *h2End) bool { return end.goAway }); end.code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("GOAWAY %v, %v; %v", end.goAway, end.code, end.err)
	}
}

// TestNoFlood: what clients do all day is not a flood, however much of it.
func TestNoFlood(t *testing.T) {
	t.Run("acknowledged data", func(t *testing.T) {
		e := newEdge(t, answering("ok"))
		h := e.h2Dial()
		for i := range uint32(floodCredit + floodCredit/2) {
			if err := h.request(2*i+1, "GET", true); err != nil {
				t.Fatal(err)
			}
			if end := h.read(func(end *h2End) bool { return end.answers[2*i+1] != "" }); end.err != nil || end.goAway {
				t.Fatal(end)
			}
			_ = h.WriteWindowUpdate(0, 2)
			_ = h.WritePing(false, [8]byte{}) // as gRPC measures the delay
			_ = h.WritePriority(2*i+3, http2.PriorityParam{Weight: 5})
		}
		if err := h.ping(); err != nil {
			t.Error(err)
		}
	})
	// A client whose deadlines pass because the backend is slow.
	t.Run("late resets", func(t *testing.T) {
		const streams = 2 * floodCredit
		var arrived atomic.Int64
		e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
			arrived.Add(1)
			<-r.Context().Done()
			return nil, r.Context().Err()
		}}, func(l *exchange.Listener) { l.Spec.Limits = &resealv1.ListenerLimits{MaxConcurrentStreams: streams} })
		h := e.h2Dial()
		for i := range uint32(streams) {
			if err := h.request(2*i+1, "GET", true); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "all have arrived", func() bool { return arrived.Load() == streams })
		time.Sleep(youngStream)
		for i := range uint32(streams) {
			if err := h.WriteRSTStream(2*i+1, http2.ErrCodeCancel); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.ping(); err != nil {
			t.Error(err)
		}
	})
	t.Run("uploads in small frames", func(t *testing.T) {
		e := newEdge(t, answering("ok"))
		h := e.h2Dial()
		_ = h.request(1, "POST", false)
		for range 3 * floodCredit {
			if err := h.WriteData(1, false, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		_ = h.WriteData(1, true, nil)
		if end := h.read(func(end *h2End) bool { return end.answers[1] != "" }); end.answers[1] != "200" {
			t.Error(end)
		}
	})
}

// TestWindowOverflow: RFC 9113 section 6.9.1.
func TestWindowOverflow(t *testing.T) {
	e := newEdge(t, answering("ok"))
	h := e.h2Dial()
	_ = h.WriteWindowUpdate(0, 1<<31-1)
	if end := h.read(func(end *h2End) bool { return end.goAway }); end.code != http2.ErrCodeFlowControl {
		t.Errorf("GOAWAY %v, %v", end.goAway, end.code)
	}
}

// TestDownloadInSmallReads: a client that takes a large body in small parts sends
// two window updates for each of them, as Go's does, and is no flood.
func TestDownloadInSmallReads(t *testing.T) {
	const size = 16 << 20
	e := newEdge(t, upstreamFuncs{roundTrip: func(*http.Request, *exchange.Exchange) (*http.Response, error) {
		response := textResponse(200, "")
		response.Body, response.ContentLength = io.NopCloser(io.LimitReader(zeros{}, size)), size
		return response, nil
	}})
	response := must[*http.Response](t)(e.client(true).Get("https://app.test/"))
	defer response.Body.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, response.Body, make([]byte, 4<<10))
	if n != size || err != nil {
		t.Errorf("%d of %d bytes: %v", n, size, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
