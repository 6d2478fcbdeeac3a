// Package framing compares how Reseal, HAProxy and nginx read messages: the same
// bytes go to all three, each in front of a backend that records which bytes came on
// which connection. Where one sees two requests and another one, a client can speak
// in another client's name (request smuggling).
package framing

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/reseal/reseal/integration/harness"
)

// The proxies, as indices.
const (
	reseal = iota
	haproxy
	nginx
	proxies
)

var names = [proxies]string{"Reseal", "HAProxy", "nginx"}

// lane is one listener of each proxy, with a recorder behind each. Cases are tried in
// it one after another.
type lane struct {
	fronts    [proxies]string
	recorders [proxies]*recorder
	tls       *tls.Config
	tried     int
}

// input is what a client sends on one connection.
type input struct {
	name  string
	http2 bool
	bytes string // mark stands for what makes the case unique
}

// mark is replaced in inputs.
const mark = "ID"

// sighting is what one proxy made of an input.
type sighting struct {
	taken
	answer string // what the client got
	// harmed says what became of the request that another client made afterwards.
	harmed error
}

// The quiet time after which an input is taken to have been worked on. What looks
// like a failure is tried again with more patience.
const (
	quick   = 40 * time.Millisecond
	patient = 500 * time.Millisecond
)

// text is what is sent for an input.
func (l *lane) text(in input) string {
	if in.http2 {
		return in.bytes
	}
	return strings.ReplaceAll(in.bytes, mark, fmt.Sprintf("n%d", l.tried))
}

// try sends an input to all proxies and returns what each made of it.
func (l *lane) try(in input, quiet time.Duration) (seen [proxies]sighting, err error) {
	l.tried++
	text := l.text(in)
	done := make(chan error, proxies)
	for i := range seen {
		go func() {
			var err error
			seen[i], err = l.send(i, in.http2, text, quiet)
			done <- err
		}()
	}
	for range seen {
		err = errors.Join(err, <-done)
	}
	return seen, err
}

// send sends bytes to one proxy on a new connection, waits until nothing comes any
// more, and makes a request as another client.
func (l *lane) send(proxy int, http2 bool, text string, quiet time.Duration) (s sighting, err error) {
	conn, err := l.dial(proxy, http2)
	if err != nil {
		return s, err
	}
	written := make(chan struct{})
	go func() { // the proxy may answer before it has read all
		defer close(written)
		_, _ = io.WriteString(conn, text)
	}()
	var answer strings.Builder
	buffer := make([]byte, 16<<10)
	for {
		_ = conn.SetReadDeadline(time.Now().Add(quiet))
		n, err := conn.Read(buffer)
		answer.Write(buffer[:n])
		if err != nil {
			break
		}
	}
	_ = conn.SetDeadline(time.Now())
	<-written
	_ = conn.Close()
	s.answer = answer.String()
	path := fmt.Sprintf("/witness-%d-%d", l.tried, proxy)
	s.harmed = l.witness(proxy, path)
	s.taken = l.recorders[proxy].take()
	// The witness is known. It must have come once, and be all that came with its name.
	own := message{method: http.MethodGet, target: path}
	count := 0
	s.messages = slices.DeleteFunc(s.messages, func(m message) bool {
		if m == own {
			count++
		}
		return m == own
	})
	if s.harmed == nil && count != 1 {
		s.harmed = fmt.Errorf("the backend saw it %d times", count)
	}
	return s, nil
}

func (l *lane) dial(proxy int, http2 bool) (*tls.Conn, error) {
	config := l.tls.Clone()
	config.NextProtos = []string{"http/1.1"}
	if http2 {
		config.NextProtos = []string{"h2"}
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", l.fronts[proxy], config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", names[proxy], err)
	}
	return conn, nil
}

// witness asks as another client does, and must get its own answer.
func (l *lane) witness(proxy int, path string) error {
	conn, err := l.dial(proxy, false)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, harness.SiteName); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(response.Body)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if response.StatusCode != http.StatusOK || string(body) != path {
		return fmt.Errorf("it got %s and %q", response.Status, body)
	}
	return nil
}

// find is the index of a message among those from an index on, or -1. One that was
// begun and broken off counts as the last.
func (s *sighting) find(m message, from int) int {
	for i, other := range s.messages[min(from, len(s.messages)):] {
		if m.same(other) {
			return from + i
		}
	}
	if slices.ContainsFunc(s.raw, func(raw string) bool { return strings.Contains(raw, m.method+" "+m.target+" HTTP/1.1\r\n") }) {
		return len(s.messages)
	}
	return -1
}

// reference is what net/http reads in the bytes of an HTTP/1 client: peers refuse
// some that nothing is wrong with, such as methods in lower case.
func reference(text string) (s sighting) {
	for reader := bufio.NewReader(strings.NewReader(text)); ; {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return s
		}
		body, err := io.ReadAll(request.Body)
		if err != nil {
			return s
		}
		s.messages = append(s.messages, message{request.Method, request.RequestURI, string(body)})
	}
}

// problems is what Reseal did that could be smuggling. Being stricter is none: it may
// answer itself what a peer sends on, and go on with what follows. But each request
// that it sends is one that a peer sends, or net/http reads, in this order.
func problems(seen [proxies]sighting, read sighting) []string {
	ours := seen[reseal]
	var found []string
	if ours.harmed != nil {
		found = append(found, fmt.Sprintf("the next client's request: %v", ours.harmed))
	}
	if ours.stray != nil {
		found = append(found, fmt.Sprintf("the backend got what readers can take differently: %v", ours.stray))
	}
	others := []sighting{seen[haproxy], seen[nginx], read}
	at := make([]int, len(others))
	for i, m := range ours.messages {
		known := false
		for j := range others {
			if n := others[j].find(m, at[j]); n >= 0 {
				at[j], known = n+1, true
			}
		}
		if !known {
			found = append(found, fmt.Sprintf("request %d reached the backend, and neither peer sent it nor does net/http read it: %v", i+1, m))
			break
		}
	}
	return found
}

// behind sends the peers what Reseal has sent to its backend, connection by
// connection: they must read the same messages in it, as far as they take them.
func (l *lane) behind(raw []string) (found []string, err error) {
	for _, text := range raw {
		want, _, _ := canonical([]byte(text)) // an error was found before
		for _, peer := range []int{haproxy, nginx} {
			s, err := l.send(peer, false, text, quick)
			if err != nil {
				return nil, err
			}
			for i, m := range s.messages {
				if i >= len(want) || !m.same(want[i]) {
					found = append(found, fmt.Sprintf("%s behind Reseal read request %d as %v in %.1000q", names[peer], i+1, m, text))
					break
				}
			}
		}
	}
	return found, nil
}

// describe is what all proxies made of an input, for failures.
func describe(in input, seen [proxies]sighting) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s: %.2000q\n", in.name, in.bytes)
	for i, s := range seen {
		fmt.Fprintf(&text, "  %-8s messages %v\n           backend got %.1500q\n           answer %.200q\n", names[i], s.messages, s.raw, s.answer)
	}
	return text.String()
}
