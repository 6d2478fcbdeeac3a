package edge

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// answersTooMuch answers each HTTP/2 request with more than the length that it
// announces.
func answersTooMuch(c net.Conn, _ int) {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	serveH2(c, func(framer *http2.Framer, f *http2.MetaHeadersFrame) {
		block.Reset()
		_ = encoder.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
		_ = encoder.WriteField(hpack.HeaderField{Name: "content-length", Value: "5"})
		answerH2(framer, f.StreamID, block.Bytes(), "more than five")
	})
}

// TestResetsBurnFewConnections: requests that we reset, because the client or the
// backend breaks its content-length, cost no backend connection each. Over HTTP/2,
// and where a body is small, they cost none; otherwise a client soon has no credit
// left and is told to calm down.
func TestResetsBurnFewConnections(t *testing.T) {
	const requests, atOnce = 2000, 50
	discard := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	http1 := func(c net.Conn, _ int) {
		reader := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
			_, _ = io.WriteString(c, ok(""))
		}
	}
	h2 := func(c net.Conn, _ int) { (&http2.Server{}).ServeConn(c, &http2.ServeConnOpts{Handler: discard}) }
	tooLong := func(c net.Conn, _ int) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nless")
	}
	for name, test := range map[string]struct {
		alpn   string
		serve  func(net.Conn, int)
		length string  // that the client announces; "" if it breaks nothing
		first  float64 // connections that one client may burn at once
		second float64 // and per second
	}{
		"small body to h1":        {"http/1.1", http1, "5", 2, 0},
		"small body to h2":        {"h2", h2, "5", 2, 0},
		"large body to h1":        {"http/1.1", http1, "20000", 50, 10}, // the credit by the cost of a fault, in edge/frontend
		"large body to h2":        {"h2", h2, "20000", 4, 0},
		"answer too short of h1":  {"http/1.1", tooLong, "", requests, 0}, // the backend ends each itself
		"answer too long over h2": {"h2", answersTooMuch, "", 4, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := serveRaw(t, test.alpn, test.serve)
			x := newLegs(t, b.address)
			c, begin := x.dialH2(), time.Now()
			underWay, ended := make(chan struct{}, atOnce), make(chan struct{})
			go func() {
				defer close(ended)
				for {
					frame, err := c.framer.ReadFrame()
					if err != nil {
						return
					}
					reset := frame.Header().Type == http2.FrameRSTStream
					if reset || frame.Header().Flags.Has(http2.FlagDataEndStream) && frame.Header().StreamID > 0 {
						<-underWay
					}
				}
			}()
			sent := 0
			for alive := true; alive && sent < requests; sent++ {
				select {
				case underWay <- struct{}{}:
				case <-ended:
				}
				fields := []string{":method", "POST", ":scheme", "https", ":path", "/", ":authority", "public.test"}
				if test.length != "" {
					fields = append(fields, "content-length", test.length)
				}
				stream := uint32(2*sent + 1)
				err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.fields(fields...), EndHeaders: true, EndStream: test.length == ""})
				if err == nil && test.length != "" {
					err = c.framer.WriteData(stream, true, []byte("not as many"))
				}
				alive = err == nil
			}
			_ = c.conn.CloseWrite()
			<-ended
			// Those that were under way when the credit was used up come on top.
			burnt, most := len(b.received()), test.first+test.second*time.Since(begin).Seconds()
			if test.second > 0 {
				most += atOnce
			}
			t.Logf("%d of %d requests were sent and %d backend connections burnt, at most %.0f may be", sent, requests, burnt, most)
			if float64(burnt) > most {
				t.Error("too many")
			}
		})
	}
}
