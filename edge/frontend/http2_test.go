package frontend

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
)

// TestRepeatedSettings: a client may name a parameter twice, and the last value is
// in force.
func TestRepeatedSettings(t *testing.T) {
	const window, table = http2.SettingInitialWindowSize, http2.SettingHeaderTableSize
	e := newEdge(t, answering("hello"))
	h := e.h2DialWith([]http2.Setting{{ID: window, Val: 65535}, {ID: table, Val: 0}, {ID: window, Val: 3}, {ID: table, Val: 4096}})
	body := func(stream uint32, until int) (got string, acks int) {
		t.Helper()
		for len(got) < until {
			f, err := h.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch f := f.(type) {
			case *http2.DataFrame:
				if f.StreamID == stream {
					got += string(f.Data())
				}
			case *http2.SettingsFrame:
				if f.IsAck() {
					acks++
				}
			case *http2.GoAwayFrame:
				t.Fatalf("GOAWAY %v", f.ErrCode)
			}
		}
		return got, acks
	}
	if err := h.request(1, "GET", true); err != nil {
		t.Fatal(err)
	}
	if got, acks := body(1, 3); got != "hel" || acks != 1 {
		t.Errorf("%q within the window, %d acknowledgements", got, acks)
	}
	if err := h.WriteSettings(http2.Setting{ID: window, Val: 0}, http2.Setting{ID: window, Val: 5}); err != nil {
		t.Fatal(err)
	}
	if got, acks := body(1, 2); got != "lo" || acks != 1 {
		t.Errorf("%q after the window was widened, %d acknowledgements", got, acks)
	}
	// One that is invalid still ends the connection.
	if err := h.WriteSettings(http2.Setting{ID: window, Val: 1 << 31}, http2.Setting{ID: window, Val: 5}); err != nil {
		t.Fatal(err)
	}
	if end := h.read(func(end *h2End) bool { return end.goAway }); end.code != http2.ErrCodeFlowControl {
		t.Errorf("GOAWAY %v, %v", end.goAway, end.code)
	}
}

// largeAnswers is an upstream whose answers are of size bytes. It says on read when
// one has been read to its end.
func largeAnswers(size int, read chan<- string) upstreamFuncs {
	return upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		response := textResponse(200, "")
		body := io.MultiReader(strings.NewReader(strings.Repeat("x", size)), atEnd(func() { read <- r.URL.Path }))
		response.Body, response.ContentLength = io.NopCloser(body), -1
		return response, nil
	}}
}

// atEnd is called when all before it has been read.
type atEnd func()

func (f atEnd) Read([]byte) (int, error) {
	f()
	return 0, io.EOF
}

// order opens windows and reads all answers. It returns the streams in the order
// in which parts of their content came.
func (h *h2Raw) order(answers int) []uint32 {
	h.t.Helper()
	if err := h.WriteWindowUpdate(0, 1<<30); err != nil {
		h.t.Fatal(err)
	}
	var order []uint32
	for answers > 0 {
		f, err := h.ReadFrame()
		if err != nil {
			h.t.Fatal(err)
		}
		if data, ok := f.(*http2.DataFrame); ok {
			order = append(order, data.StreamID)
			if data.StreamEnded() {
				answers--
			}
		}
	}
	return order
}

// switches counts how often another stream has its turn.
func switches(order []uint32) int {
	n := 0
	for i := 1; i < len(order); i++ {
		if order[i] != order[i-1] {
			n++
		}
	}
	return n
}

// TestPriorities: of several answers that wait for the client the most urgent goes
// first, and equals go one by one or side by side, as the client has asked (RFC
// 9218).
func TestPriorities(t *testing.T) {
	const size, streams = 160 << 10, 3
	for name, test := range map[string]struct {
		priorities [streams]string
		update     string // of the first stream
		want       []uint32
		shared     bool
	}{
		"by urgency":             {[streams]string{"u=5", "u=1", "u=3"}, "", []uint32{3, 5, 1}, false},
		"in order":               {[streams]string{"u=3", "u=3", "u=3"}, "", []uint32{1, 3, 5}, false},
		"updated":                {[streams]string{"u=3", "u=3", "u=3"}, "u=7", []uint32{3, 5, 1}, false},
		"side by side":           {[streams]string{"i", "i", "i"}, "", nil, true},
		"nothing said":           {[streams]string{"", "", ""}, "", nil, true},
		"urgent beside the rest": {[streams]string{"", "u=0", ""}, "", []uint32{3}, true},
	} {
		t.Run(name, func(t *testing.T) {
			read := make(chan string, streams)
			h := newEdge(t, largeAnswers(size, read)).h2DialWith([]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1 << 20}})
			// What is sent before is not what is measured: it uses up the window of the
			// connection.
			h.path = "/first"
			_ = h.request(101, "GET", true)
			<-read
			h.path = "/"
			for i, priority := range test.priorities {
				var fields []string
				if priority != "" {
					fields = []string{"priority", priority}
				}
				_ = h.request(uint32(103+2*i), "GET", true, fields...)
				<-read
			}
			_ = h.WriteRSTStream(101, http2.ErrCodeCancel)
			if test.update != "" {
				_ = h.WriteRawFrame(0x10, 0, 0, append(binary.BigEndian.AppendUint32(nil, 103), test.update...))
			}
			if err := h.ping(); err != nil {
				t.Fatal(err)
			}
			order := h.order(streams)
			for i := range order {
				order[i] -= 102 // 1, 3, 5
			}
			// Some turns are not by priority, and the end may come alone.
			strays := len(order)/evenTurn + streams
			n := switches(order)
			if test.shared && n < streams*3 || !test.shared && n > 2*strays+streams {
				t.Errorf("%d switches: %v", n, order)
			}
			var ends []uint32
			for i, id := range order {
				if !slices.Contains(order[i+1:], id) {
					ends = append(ends, id)
				}
			}
			if fmt.Sprint(ends[:len(test.want)]) != fmt.Sprint(test.want) {
				t.Errorf("ended in the order %v, want %v: %v", ends, test.want, order)
			}
		})
	}
}

// TestSlowStream: a stream whose answer the client does not take, and one whose
// body the backend does not take, hold up no other.
func TestSlowStream(t *testing.T) {
	release := make(chan struct{})
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		if r.URL.Path == "/stuck" {
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
		if r.Body != nil {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return nil, err
			}
		}
		return textResponse(200, strings.Repeat("x", 200<<10)), nil
	}})
	h := e.h2Dial()
	_ = h.WriteWindowUpdate(0, 1<<30)
	_ = h.request(1, "GET", true) // its window is 65535 bytes
	h.path = "/stuck"
	_ = h.request(3, "POST", false)
	part := make([]byte, 16<<10)
	for range exchange.UploadWindow / len(part) {
		_ = h.WriteData(3, false, part)
	}
	h.path = "/"
	for i := range uint32(20) {
		stream := 5 + 2*i
		_ = h.request(stream, "POST", false)
		_ = h.WriteWindowUpdate(stream, 1<<20)
		for range exchange.UploadWindow / len(part) {
			if err := h.WriteData(stream, false, part); err != nil {
				t.Fatal(err)
			}
		}
		_ = h.WriteData(stream, true, nil)
		for ended := false; !ended; {
			f, err := h.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if reset, ok := f.(*http2.RSTStreamFrame); ok {
				t.Fatal(reset)
			}
			data, ok := f.(*http2.DataFrame)
			ended = ok && data.StreamID == stream && data.StreamEnded()
		}
	}
	close(release)
	_ = h.WriteData(3, true, nil)
	_ = h.WriteWindowUpdate(1, 1<<20)
	if end := h.read(func(end *h2End) bool { return end.answers[3] != "" }); end.answers[3] != "200" {
		t.Errorf("the stuck one: %+v", end)
	}
}

// TestWithoutWindow: a client that may not send its body, since backends don't take
// those of its other requests, is not taken for one that stalls.
func TestWithoutWindow(t *testing.T) {
	const idle = 3 * time.Second // the client's own turns take some time, too
	release := make(chan struct{})
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		<-release
		_, err := io.Copy(io.Discard, r.Body)
		return textResponse(200, "ok"), err
	}}, short, func(l *exchange.Listener) {
		l.Spec.Timeouts.Idle = durationpb.New(idle)
	})
	h := e.h2Dial()
	part := make([]byte, 16<<10)
	const streams = connectionStreams + 4
	for i := range uint32(streams) {
		_ = h.request(2*i+1, "POST", false)
		for n := 0; i < connectionStreams && n < exchange.UploadWindow; n += len(part) {
			if err := h.WriteData(2*i+1, false, part); err != nil {
				t.Fatal(err)
			}
		}
	}
	time.Sleep(idle + idle/2)
	close(release)
	// The rest goes as soon as there is a window again.
	_ = h.conn.SetReadDeadline(time.Now().Add(patience))
	for {
		f, err := h.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if head, ok := f.(*http2.MetaHeadersFrame); ok {
			t.Fatalf("stream %d is answered %s", head.StreamID, head.PseudoValue("status"))
		}
		if update, ok := f.(*http2.WindowUpdateFrame); ok && update.StreamID == 0 && update.Increment > 1<<20 {
			break
		}
	}
	for i := range uint32(streams) {
		_ = h.WriteData(2*i+1, true, []byte("end"))
	}
	end := h.read(func(end *h2End) bool { return len(end.answers) == streams })
	for stream, status := range end.answers {
		if status != "200" {
			t.Errorf("stream %d: %s", stream, status)
		}
	}
}

// TestManyStreams: whatever clients do at once, bodies arrive whole and in order.
func TestManyStreams(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{}, Body: r.Body, ContentLength: r.ContentLength}, nil
	}})
	client := e.client(true)
	var working sync.WaitGroup
	for worker := range 40 {
		random := rand.New(rand.NewPCG(1, uint64(worker)))
		working.Go(func() {
			for i := range 8 {
				size := 1 + random.IntN(600<<10)
				sent := make([]byte, size)
				for at := range sent {
					sent[at] = byte(at*7 + worker + i)
				}
				var body io.Reader = bytes.NewReader(sent)
				if i%2 == 0 {
					body = io.MultiReader(body) // of unknown length
				}
				request := must[*http.Request](t)(http.NewRequest("POST", "https://app.test/", body))
				request.Header.Set("Priority", fmt.Sprintf("u=%d", random.IntN(8)))
				response, err := client.Do(request)
				if err != nil {
					t.Error(err)
					return
				}
				if random.IntN(4) == 0 { // one that thinks better of it
					_, _ = io.CopyN(io.Discard, response.Body, int64(random.IntN(size)))
					response.Body.Close()
					continue
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d of %d bytes came back: %v", len(got), size, err)
				}
			}
		})
	}
	working.Wait()
}

// TestAnswerBeforeBody: a client that has its answer, and then gives up the rest of
// its request, has not aborted anything.
func TestAnswerBeforeBody(t *testing.T) {
	e := newEdge(t, upstreamFuncs{roundTrip: obliging})
	h := e.h2Dial()
	h.path = "/early"
	_ = h.request(1, "POST", false)
	for ended := false; !ended; {
		f, err := h.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		data, ok := f.(*http2.DataFrame)
		ended = ok && data.StreamEnded()
	}
	_ = h.WriteRSTStream(1, http2.ErrCodeCancel)
	if record := e.logged(1); record["status"] != 200.0 || record["reason"] != "" {
		t.Errorf("logged %v", record)
	}
}
