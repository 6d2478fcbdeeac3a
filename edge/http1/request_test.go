package http1

import (
	"fmt"
	"strings"
	"testing"
)

func fromClient() *driver { return server(Limits{HeadBytes: 600, Fields: 8, TrailerBytes: 64}) }

func TestRequests(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: app.test\r\n"
	for stream, want := range map[string]string{
		get + "\r\n": "GET https app.test / \"\" 0 HTTP/1.1 false false []\nend []\nreusable true",
		get + "X-a: 1\r\nx-A:2\t\r\nY:\r\nC: \xe9\r\n\r\n":            `GET https app.test / "" 0 HTTP/1.1 false false [{"X-a" "1"} {"x-A" "2"} {"Y" ""} {"C" "\xe9"}]`,
		"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n" + get + "\r\n":    "GET https a / \"\" 0 HTTP/1.1 false false []\nend []\nGET https app.test",
		"GET http://b.test:81/x?y HTTP/1.1\r\nHost: app.test\r\n\r\n": `GET http b.test:81 /x?y "" 0`,
		"GET HTTPS://b.test?y HTTP/1.1\r\nHost: app.test\r\n\r\n":     `GET https b.test /?y "" 0`,
		"OPTIONS * HTTP/1.1\r\nHost: app.test\r\n\r\n":                `OPTIONS https app.test * ""`,
		"OPTIONS http://b.test HTTP/1.1\r\nHost: app.test\r\n\r\n":    `OPTIONS http b.test * ""`,
		"OPTIONS http://b.test/ HTTP/1.1\r\nHost: app.test\r\n\r\n":   `OPTIONS http b.test / ""`,
		"get //a%2F|?% HTTP/1.2\r\nHost: [::1]:8\r\n\r\n":             `get https [::1]:8 //a%2F|?% "" 0 HTTP/1.1`,
		"GET / HTTP/1.0\r\n\r\n":                                      "GET https  / \"\" 0 HTTP/1.0 false false []\nend []\nreusable false over true lingers false",
		"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n":            "reusable true",
		"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n":     "reusable false over true",
		get + "Connection: x, Close\r\n\r\n" + get + "\r\n":           "[]\nend []\nreusable false over true lingers false",
		get + "Connection: x-hop, cookie\r\nX-Hop: 1\r\nCookie: c\r\nKeep-Alive: 1\r\nProxy-Connection: x\r\nHTTP2-Settings: x\r\n\r\n": `[{"Cookie" "c"}]`,
		get + "Connection: te\r\nTE: gzip;q=1, Trailers\r\n\r\n":                                                                        "HTTP/1.1 false true []",
		get + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n":                                                                       `/ "websocket" 0`,
		get + "Upgrade: websocket\r\n\r\n":                                                                                              `/ "" 0`,
		get + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n":                                                                             `/ "" 0`,
		get + "Connection: Upgrade\r\nUpgrade: a, b\r\n\r\n":                                                                            `/ "" 0`,
		get + "Connection: Upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n\r\n":                                                                 `/ "" 0`,
		get + "Connection: Upgrade\r\nUpgrade: a\r\nContent-Length: 1\r\n\r\nx":                                                         `/ "" 1`,
		get + "Content-Length: 3\r\nExpect: 100-Continue\r\n\r\nabc":                                                                    "3 HTTP/1.1 true false []\ndata \"abc\"\nend []\nreusable true",
		get + "Expect: 100-continue\r\n\r\n":                                                                                            "0 HTTP/1.1 false",
		"GET / HTTP/1.0\r\nExpect: x\r\nContent-Length: 1\r\n\r\nx":                                                                     "1 HTTP/1.0 false",
		get + "Transfer-Encoding: Chunked\r\nTrailer: X-T\r\n\r\n3;a=\"b\"\r\nabc\r\n00A \r\n0123456789\r\n0\r\nX-T: 1\r\nContent-Length: 3\r\n\r\n" + get + "\r\n": "-1 HTTP/1.1 false false [{\"Trailer\" \"X-T\"}]\ndata \"abc0123456789\"\nend [{\"X-T\" \"1\"}]\nGET",
		get + "Connection: x-t, cookie\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-T: 1\r\nX-U: 2\r\n\r\n":                                                          `end [{"X-U" "2"}]`,
		get + "Trailer: Expires\r\n\r\n": "false false []",
		// Refused.
		"GET / HTTP/1.1\nHost: a\r\n\r\n":                            "error 400 bad_request\nreusable false over false lingers true",
		"GET /\rHTTP/1.1\r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		"GET / HTTP/1.1\r\nHost: a\r\n\n":                            "error 400 bad_request",
		"GET / HTTP/1.1\r\n\r\n":                                     "error 400 bad_host",
		get + "Host: app.test\r\n\r\n":                               "error 400 bad_host",
		"GET / HTTP/1.1\r\nHost:\r\n\r\n":                            "error 400 bad_host",
		"GET / HTTP/1.1\r\nHost: a b\r\n\r\n":                        "error 400 bad_host",
		"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n":                        "error 400 bad_host",
		"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n":                       "error 400 bad_host",
		"GET http://b/ HTTP/1.1\r\nHost: a/b\r\n\r\n":                "error 400 bad_host",
		"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n":                  "error 400 bad_host",
		"GET http://u@b/ HTTP/1.1\r\nHost: a\r\n\r\n":                "error 400 bad_target",
		"GET ftp://b/ HTTP/1.1\r\nHost: a\r\n\r\n":                   "error 400 bad_target",
		"GET mailto:x HTTP/1.1\r\nHost: a\r\n\r\n":                   "error 400 bad_target",
		"GET a HTTP/1.1\r\nHost: a\r\n\r\n":                          "error 400 bad_target",
		"GET  HTTP/1.1\r\nHost: a\r\n\r\n":                           "error 400 bad_target",
		"GET * HTTP/1.1\r\nHost: a\r\n\r\n":                          "error 400 bad_target",
		"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n":                        "error 400 bad_target",
		"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n":                       "error 400 bad_target",
		"GET /\ta HTTP/1.1\r\nHost: a\r\n\r\n":                       "error 400 bad_target",
		"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n":                      "error 400 bad_target",
		"GET  / HTTP/1.1\r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		"GET /  HTTP/1.1\r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		"GET / HTTP/1.1 \r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		" GET / HTTP/1.1\r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		"GET /\r\nHost: a\r\n\r\n":                                   "error 400 bad_request",
		"G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n":                       "error 400 bad_request",
		"GET / HTTP/1.11\r\nHost: a\r\n\r\n":                         "error 400 bad_request",
		"GET / http/1.1\r\nHost: a\r\n\r\n":                          "error 400 bad_request",
		"GET / HTTP/2.0\r\nHost: a\r\n\r\n":                          "error 505 bad_request",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                           "error 505 bad_request",
		"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n":              "error 405 method_not_allowed",
		"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n":                  "error 400 bad_request",
		get + "Expect: 200-ok\r\n\r\n":                               "error 417 bad_request",
		get + "Trailer: Content-Length\r\n\r\n":                      "error 400 bad_request",
		get + "Connection: " + strings.Repeat("a,", 70) + "\r\n\r\n": "error 400 bad_request",
		get + strings.Repeat("Connection: a\r\n", 5) + "\r\n":        "error 400 bad_request",
		get + "A : b\r\n\r\n":                                        "error 400 bad_request",
		get + "A\r\n\r\n":                                            "error 400 bad_request",
		get + ": b\r\n\r\n":                                          "error 400 bad_request",
		get + "A: b\r\n c\r\n\r\n":                                   "error 400 bad_request",
		"GET / HTTP/1.1\r\n Host: a\r\n\r\n":                         "error 400 bad_request",
		get + "A: b\x00c\r\n\r\n":                                    "error 400 bad_request",
		get + "A: b\rContent-Length: 5\r\n\r\n":                      "error 400 bad_request",
		get + "A: b\nContent-Length: 5\r\n\r\n":                      "error 400 bad_request",
		get + "A\x00: b\r\n\r\n":                                     "error 400 bad_request",
		get + "X: " + strings.Repeat("x", 600) + "\r\n\r\n":          "error 431 header_too_large",
		strings.Repeat("x", 700):                                     "error 431 header_too_large",
		get + strings.Repeat("X: y\r\n", 8) + "\r\n":                 "error 431 too_many_fields",
		get + "Content-Length: 3\r\n\r\nabcPOST\n":                   "end []\nerror 400 bad_request",
	} {
		if got := everySplit(t, stream, fromClient); !strings.Contains(got, want) {
			t.Errorf("%q:\n%s\nwant\n%s", stream, got, want)
		}
	}
}

// TestFramingMatrix puts every way to say a length in every order.
func TestFramingMatrix(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: app.test\r\n"
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n"
	lengths := map[string]bool{
		"": true, "3": true, "03": true, "+3": false, "-3": false, "0x3": false, "3 3": false, "3, 3": false, "3,4": false, " ": false, "3_0": false,
		"18446744073709551617": false, "9223372036854775808": false, "3;": false, "٣": false, "3\x00": false, "3\v": false,
	}
	codings := map[string]int{
		"": 200, "chunked": 200, "CHUNKED": 200, " chunked\t": 200, "chunked, chunked": 501, "chunked,": 501, "gzip, chunked": 501, "identity": 501,
		"xchunked": 501, "\"chunked\"": 501, "chunked;q=1": 501, " ": 501, "\vchunked": 400, "chunked\x00": 400,
	}
	for length, good := range lengths {
		for coding, status := range codings {
			for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
				var fields []string
				if length != "" {
					fields = append(fields, "Content-Length: "+length+"\r\n")
				}
				if coding != "" {
					fields = append(fields, "transfer-encoding: "+coding+"\r\n")
				}
				for _, order := range [][]string{fields, {strings.Join(reversed(fields), "")}} {
					want := status
					if !good && (want == 200 || len(fields) < 2) || want == 200 && (len(fields) == 2 || coding != "" && version == "HTTP/1.0") {
						want = 400
					}
					body := "abc"
					if coding != "" {
						body = "3\r\nabc\r\n0\r\n\r\n"
					} else if length == "" {
						body = ""
					}
					stream := strings.Replace(head, "HTTP/1.1", version+"\r\nConnection: keep-alive", 1) + strings.Join(order, "") + "\r\n" + body + smuggled
					got := splits(t, stream, 11, fromClient)
					switch {
					case want == 200 && (strings.Contains(got, "error") || strings.Count(got, "end") != 2):
						t.Errorf("%q: %s", stream, got)
					case want == 200:
					case !good && status > 400: // whichever of the two comes first
						if strings.Contains(got, "smuggled") || !strings.HasPrefix(got, "error ") {
							t.Errorf("%q: %s", stream, got)
						}
					case !strings.HasPrefix(got, fmt.Sprintf("error %d bad_request\n", want)):
						t.Errorf("%q: %s, want %d", stream, got, want)
					}
				}
			}
		}
	}
	for _, twice := range []string{
		"Content-Length: 3\r\nContent-Length: 3\r\n", "Content-Length: 3\r\ncontent-length: 4\r\n",
		"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "Content-Length : 3\r\n", "Transfer-Encoding\t: chunked\r\n",
	} {
		if got := everySplit(t, head+twice+"\r\nabc"+smuggled, fromClient); !strings.HasPrefix(got, "error ") {
			t.Errorf("%q: %s", twice, got)
		}
	}
}

func reversed(fields []string) []string {
	if len(fields) == 2 {
		return []string{fields[1], fields[0]}
	}
	return fields
}

func TestChunks(t *testing.T) {
	const head = "POST / HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n"
	for body, good := range map[string]bool{
		"0\r\n\r\n": true, "000\r\n\r\n": true, "1\r\nx\r\n0;a\r\n\r\n": true, "1;a=\"b;c\"\r\nx\r\n0\r\nA: b\r\nC: d\r\n\r\n": true,
		"7fffffffffffffff\r\nx": false, "10000000000000000\r\nx": false, "ffffffffffffffff0\r\nx": false, "0000000000000000\r\n\r\n": false,
		"+1\r\nx": false, "1 ;a\r\nx": false, strings.Repeat("1;"+strings.Repeat("a", 1000)+"\r\nx\r\n", 15) + "0\r\n\r\n": true,
		strings.Repeat("1;"+strings.Repeat("a", 1000)+"\r\nx\r\n", 20) + "0\r\n\r\n": false, "-1\r\nx": false, "0x1\r\nx": false, "\r\n": false, " 1\r\nx": false, "g\r\nx": false, "1 2\r\nx": false, ";a\r\nx": false,
		"1\nx\r\n0\r\n\r\n": false, "1\rx\r\n": false, "1;a\nb\r\nx\r\n": false, "1;a\rb\r\nx\r\n": false, "1;\x00\r\nx": false,
		"1\r\nx\n0\r\n\r\n": false, "1\r\nxy\r\n": false, "1\r\nx\rn0\r\n\r\n": false, "2\r\nx\r\n0\r\n\r\n": false,
		"1;" + strings.Repeat("a", 5000) + "\r\nx": false, strings.Repeat("0", 5000): false,
		"0\r\nA: b\n\r\n": false, "0\r\nA: b\r\n c\r\n\r\n": false, "0\r\nA : b\r\n\r\n": false, "0\r\n\n": false, "0\r\nA: \x01\r\n\r\n": false,
		"0\r\nA: " + strings.Repeat("x", 64) + "\r\n\r\n": false, "0\r\n" + strings.Repeat("A: b\r\n", 9) + "\r\n": false, "0\r\nGET / HTTP/1.1\r\n\r\n": false,
	} {
		got := everySplit(t, head+body, fromClient)
		if strings.Contains(got, "end") != good || strings.Contains(got, "error 400 bad_request") == good {
			t.Errorf("%.60q: %s", body, got)
		}
	}
}

// TestPipeline: what follows a request is looked at once that was answered.
func TestPipeline(t *testing.T) {
	const pipeline = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd" +
		"POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\nX-T: 1\r\n\r\n" +
		"\r\nGET /4 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nGET /5 HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\nGET /6 HTTP/1.1\r\nHost: a\r\n\r\n"
	got := everySplit(t, pipeline, fromClient)
	if strings.Count(got, "end") != 4 || strings.Contains(got, "/5") || strings.Contains(got, "/6") || !strings.Contains(got, "error 400") {
		t.Error(got)
	}
	d := fromClient()
	d.ended = func() {} // no answer yet
	d.feed([]byte(pipeline))
	if got := d.String(); d.heads != 1 || !strings.HasSuffix(got, "end []\nreusable false over false lingers false") || !strings.HasPrefix(string(d.held), "POST /2") {
		t.Errorf("%s, %q", got, d.held)
	}
}

// TestTrickle: of a head that comes byte by byte each byte is searched once.
func TestTrickle(t *testing.T) {
	head := "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 8<<10) + "\r\n\r\n"
	c, event := NewServer(Limits{}), Event{}
	for i := 1; i < len(head); i++ {
		if n, err := c.Next([]byte(head[:i]), &event); n != 0 || err != nil || event.Kind != None || c.seen != i {
			t.Fatalf("%d bytes: %d %v, kind %d, %d searched", i, n, err, event.Kind, c.seen)
		}
		if c.Reusable() || c.Over() {
			t.Fatal("a connection inside a head")
		}
	}
	if n, err := c.Next([]byte(head), &event); n != len(head) || err != nil || event.Kind != Request || c.seen != 0 {
		t.Fatalf("%d %v, kind %d", n, err, event.Kind)
	}
}
