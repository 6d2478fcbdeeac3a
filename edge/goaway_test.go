package edge

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// servePicky serves most requests per connection over HTTP/2 and answers with
// the digest of their body. Then it turns streams away: by GOAWAY, as nginx after
// keepalive_requests, once a part of their body has come, or by REFUSED_STREAM
// for every other stream.
func servePicky(c net.Conn, most int, refuse bool) {
	reader := bufio.NewReader(c)
	if _, err := reader.Discard(len(http2.ClientPreface)); err != nil {
		return
	}
	framer := http2.NewFramer(c, reader)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	_ = framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	_ = framer.WriteWindowUpdate(0, 1<<24)
	open, served, last, away := map[uint32]hash.Hash{}, 0, uint32(0), false
	answer := func(stream uint32) {
		block.Reset()
		_ = encoder.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true})
		_ = framer.WriteData(stream, true, fmt.Appendf(nil, "%x", open[stream].Sum(nil)))
		delete(open, stream)
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return
		}
		stream := frame.Header().StreamID
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			served++
			switch {
			case refuse && served%2 == 0:
				_ = framer.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
			case refuse || served <= most:
				last = stream
				open[stream] = sha256.New()
				if f.StreamEnded() {
					answer(stream)
				}
			}
		case *http2.DataFrame:
			if open[stream] != nil {
				open[stream].Write(f.Data())
				if f.StreamEnded() {
					answer(stream)
				}
			} else if !away && !refuse {
				away = true
				_ = framer.WriteGoAway(last, http2.ErrCodeNo, nil)
			}
		}
	}
}

// TestTurnedAwayRequests: what an HTTP/2 backend says that it has not processed
// is sent again, with its body, even when no retries are left.
func TestTurnedAwayRequests(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		t.Run(fmt.Sprint("refused=", refuse), func(t *testing.T) {
			b := serveRaw(t, "h2", func(c net.Conn, _ int) { servePicky(c, 5, refuse) })
			x := newLegs(t, b.address, func(_ *resealv1.Listener, p *resealv1.BackendPool) {
				p.Retries = &resealv1.Retries{Attempts: proto.Uint32(0)}
			})
			var clients sync.WaitGroup
			for client := range 4 {
				conn := x.dial("http/1.1")
				clients.Go(func() {
					reader := bufio.NewReader(conn)
					for i := range 12 {
						size := []int{1, 17_000, 60_000, 200_000}[(client+i)%4]
						body := bytes.Repeat([]byte{byte(client), byte(i), 7}, size/3+1)
						framing, sent := fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)), string(body)
						if i%3 == 0 {
							framing = "Transfer-Encoding: chunked\r\n\r\n"
							sent = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
						}
						if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: public.test\r\n"+framing+sent); err != nil {
							t.Error(err)
							return
						}
						status, got, err := readAnswer(reader)
						if want := fmt.Sprintf("%x", sha256.Sum256(body)); err != nil || status != 200 || got != want {
							t.Errorf("client %d, request %d of %d bytes: %d %q %v", client, i, len(body), status, got, err)
							return
						}
					}
				})
			}
			clients.Wait()
		})
	}
}
