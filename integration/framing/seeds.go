package framing

import (
	"bytes"
	"fmt"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/reseal/reseal/integration/harness"
)

// host is the field that requests must have.
const host = "Host: " + harness.SiteName + "\r\n"

// next is a request that follows another on the connection.
const next = "GET /ID/next HTTP/1.1\r\n" + host + "\r\n"

// seeds are the inputs of the fixed matrix.
func seeds() []input {
	all := []input{{name: "plain", bytes: "GET /ID HTTP/1.1\r\n" + host + "\r\n" + next}}
	all = append(all, lengths()...)
	all = append(all, chunks()...)
	all = append(all, lines()...)
	return append(all, downgrades()...)
}

// lengths are Content-Length and Transfer-Encoding in all combinations (RFC 9112
// section 6).
func lengths() []input {
	contentLengths := []string{
		"", "5", "0", "+5", "-5", "5, 5", "5,6", "05", "0x5", "5\t", "5 5", "5;", "", "\v5", "5\x00", "18446744073709551621", "4294967301",
		"5\r\nContent-Length: 6", "5\r\nContent-Length: 5", "0\r\ncontent-length: 5",
	}
	encodings := []string{
		"", "chunked", "Chunked", "\tchunked", "chunked\t", "chunked, chunked", "identity", "identity, chunked", "chunked, identity",
		"xchunked", "gzip, chunked", "chunked;q=1", "\"chunked\"", "\vchunked", "chunked\x00", ",chunked", "chunked,", "x\r\n chunked",
		"chunked\r\nTransfer-Encoding: x", "x\r\nTransfer-Encoding: chunked",
	}
	var all []input
	for i, length := range contentLengths {
		for j, encoding := range encodings {
			var fields string
			if i > 0 {
				fields += "Content-Length: " + length + "\r\n"
			}
			if j > 0 {
				fields += "Transfer-Encoding: " + encoding + "\r\n"
			}
			all = append(all, input{
				name:  fmt.Sprintf("lengths/%q/%q", length, encoding),
				bytes: "POST /ID HTTP/1.1\r\n" + host + fields + "\r\n0\r\n\r\n" + next,
			})
		}
	}
	for _, name := range []string{
		"Transfer-Encoding ", "Transfer-Encoding\t", " Transfer-Encoding", "Transfer_Encoding", "Transfer-Encoding\x00", "Transfer-Encoding\r",
		"X\r\nTransfer-Encoding", "X: y\nTransfer-Encoding", "X: y\rTransfer-Encoding", "transfer-encoding", "Transfer\u2010Encoding", ":Transfer-Encoding",
		"Content-Length: 5\r\n\tTransfer-Encoding", "Connection: Transfer-Encoding\r\nTransfer-Encoding", "Content-Length: 5\r\nConnection: Content-Length\r\nTransfer-Encoding",
	} {
		all = append(all, input{
			name:  fmt.Sprintf("names/%q", name),
			bytes: "POST /ID HTTP/1.1\r\n" + host + name + ": chunked\r\n\r\n0\r\n\r\n" + next,
		}, input{
			name:  fmt.Sprintf("names with a length/%q", name),
			bytes: "POST /ID HTTP/1.1\r\n" + host + "Content-Length: 5\r\n" + name + ": chunked\r\n\r\n0\r\n\r\n" + next,
		})
	}
	for _, version := range []string{"HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/1.1 ", "HTTP/1.1\t", "HTTP/01.1", "http/1.1", "HTTP/1.1\v", "", "HTTP/1.10"} {
		all = append(all, input{
			name:  fmt.Sprintf("version/%q", version),
			bytes: "POST /ID " + version + "\r\n" + host + "Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\n" + next,
		})
	}
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "CONNECT"} {
		all = append(all, input{
			name:  "body of " + method,
			bytes: method + " /ID HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhello" + next,
		})
	}
	return all
}

// chunks are chunked bodies (RFC 9112 section 7.1) that some read differently.
func chunks() []input {
	var all []input
	for _, body := range []string{
		"5\r\nhello\r\n0\r\n\r\n", "5;x\r\nhello\r\n0\r\n\r\n", "5;x=\"\r\n\"\r\nhello\r\n0\r\n\r\n", "5;x\n\r\nhello\r\n0\r\n\r\n", "0005\r\nhello\r\n0\r\n\r\n",
		"5 \r\nhello\r\n0\r\n\r\n", " 5\r\nhello\r\n0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n", "-1\r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n",
		"5\nhello\r\n0\r\n\r\n", "5\rhello\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello0\r\n\r\n", "5\r\nhelloX\r\n0\r\n\r\n", "5\r\nhell\r\n0\r\n\r\n",
		"FFFFFFFFFFFFFFFB\r\nhello\r\n0\r\n\r\n", "FFFFFFFF00000005\r\nhello\r\n0\r\n\r\n", "10000000000000005\r\nhello\r\n0\r\n\r\n", "100000005\r\nhello\r\n0\r\n\r\n",
		"00000000000000000000000000000005\r\nhello\r\n0\r\n\r\n", "g\r\nhello\r\n0\r\n\r\n", "\r\nhello\r\n0\r\n\r\n", "5_0\r\nhello\r\n0\r\n\r\n", "5\x00\r\nhello\r\n0\r\n\r\n",
		"5\r\nhello\r\n00\r\n\r\n", "5\r\nhello\r\n0\n\r\n", "5\r\nhello\r\n0\r\n\n", "5\r\nhello\r\n0\r\r\n", "5\r\nhello\r\n0;x\r\n\r\n", "5\r\nhello\r\n0\r\nX: y\r\n\r\n",
		"5\r\nhello\r\n0\r\nX : y\r\n\r\n", "5\r\nhello\r\n0\r\n X: y\r\n\r\n", "5\r\nhello\r\n0\r\nX\r\n\r\n", "5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
		"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n0\r\nHost: other.test\r\n\r\n", "5\r\nhello\r\n0\r\nX: y\n\r\n", "5\r\nhello\r\n0\r\nX: y\rZ: a\r\n\r\n",
		"5\r\nhello\r\n0\r\nGET /ID/trailer HTTP/1.1\r\nHost: a\r\n\r\n", "5\r\nhello\r\n0\r\nX: y\x00\r\n\r\n",
	} {
		all = append(all, input{
			name:  fmt.Sprintf("chunks/%q", body),
			bytes: "POST /ID HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n" + body + next,
		})
	}
	return all
}

// lines are heads (RFC 9112 sections 2.2, 3 and 5) that some read differently.
func lines() []input {
	var all []input
	for _, head := range []string{
		"GET /ID HTTP/1.1\n" + host + "\n", "GET /ID HTTP/1.1\r\n" + host + "\n", "GET /ID HTTP/1.1\r" + host + "\r\n\r\n", "\r\n\r\nGET /ID HTTP/1.1\r\n" + host + "\r\n",
		"\nGET /ID HTTP/1.1\r\n" + host + "\r\n", " GET /ID HTTP/1.1\r\n" + host + "\r\n", "GET  /ID HTTP/1.1\r\n" + host + "\r\n", "GET\t/ID HTTP/1.1\r\n" + host + "\r\n",
		"GET /ID  HTTP/1.1\r\n" + host + "\r\n", "GET /ID x HTTP/1.1\r\n" + host + "\r\n", "GET /ID\vx HTTP/1.1\r\n" + host + "\r\n", "GET /ID\x00 HTTP/1.1\r\n" + host + "\r\n",
		"GET /ID\r HTTP/1.1\r\n" + host + "\r\n", "GET /ID#f HTTP/1.1\r\n" + host + "\r\n", "GET /ID/../x HTTP/1.1\r\n" + host + "\r\n", "GET /ID%2f%00 HTTP/1.1\r\n" + host + "\r\n",
		"GET http://site.test/ID HTTP/1.1\r\n" + host + "\r\n", "GET https://site.test/ID HTTP/1.1\r\n" + host + "\r\n", "GET http://other.test/ID HTTP/1.1\r\n" + host + "\r\n",
		"GET //site.test/ID HTTP/1.1\r\n" + host + "\r\n", "GET ID HTTP/1.1\r\n" + host + "\r\n", "OPTIONS * HTTP/1.1\r\n" + host + "\r\n", "CONNECT site.test:443 HTTP/1.1\r\n" + host + "\r\n",
		"G\x00T /ID HTTP/1.1\r\n" + host + "\r\n", "GE T /ID HTTP/1.1\r\n" + host + "\r\n", "get /ID HTTP/1.1\r\n" + host + "\r\n", "GET /ID HTTP/1.1\r\n\r\n",
		"GET /ID HTTP/1.1\r\n" + host + host + "\r\n", "GET /ID HTTP/1.1\r\nHost: site.test, other.test\r\n\r\n", "GET /ID HTTP/1.1\r\nHost: a@site.test\r\n\r\n",
		"GET /ID HTTP/1.1\r\nHost: site.test:443\r\n\r\n", "GET /ID HTTP/1.1\r\nHost: site.test/x\r\n\r\n", "GET /ID HTTP/1.1\r\nHost : site.test\r\n\r\n", "GET /ID HTTP/1.1\r\nHost:\r\n site.test\r\n\r\n",
		"GET /ID HTTP/1.1\r\nHost: other.test\r\n" + host + "\r\n", "GET /ID HTTP/1.1\r\nhost: site.test\r\nHOST: other.test\r\n\r\n",
	} {
		all = append(all, input{name: fmt.Sprintf("head/%q", head), bytes: head + next})
	}
	for _, field := range []string{
		"X: a\rb", "X: a\nb", "X: a\x00b", "X: a\x7fb", "X: \x01", "X: a\r\n b", "X: a\r\n\tb", "X:a", "X :a", "X", ": a", "X Y: a", "X\x00: a", "X\n: a", "X(: a", "\xc3\xa9: a", "X: \xff",
		"X: a\r\r", "X: a\r\n\r", "Content-Length: 0\rX: y", "X: a\r\nContent-Length: 24\r\n", "X: y\r\n\r\nGET /ID/inner HTTP/1.1\r\nX: y", "X: y\n\nGET /ID/inner HTTP/1.1\nHost: a\nX: y",
		"X: y\r\rGET /ID/inner HTTP/1.1\rHost: a\rX: y", "Connection: close", "Connection: close, host", "Connection: x-forwarded-for", "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA",
		"Upgrade: websocket\r\nConnection: Upgrade", "Expect: 100-continue", "Expect: x", "TE: trailers", "Trailer: Content-Length", "Keep-Alive: x", "Proxy-Connection: keep-alive", "Content-Length : 5", "Content-Length\x00: 5", "Content_Length: 5",
	} {
		all = append(all, input{
			name:  fmt.Sprintf("field/%q", field),
			bytes: "GET /ID HTTP/1.1\r\n" + host + field + "\r\n\r\n" + next,
		}, input{
			name:  fmt.Sprintf("field first/%q", field),
			bytes: "POST /ID HTTP/1.1\r\n" + field + "\r\n" + host + "Content-Length: 5\r\n\r\nhello" + next,
		})
	}
	return all
}

// downgrades are HTTP/2 requests that would be others in HTTP/1.1 (RFC 9113 sections
// 8.2.1 and 10.3).
func downgrades() []input {
	const inner = "GET /inner HTTP/1.1\r\nHost: a\r\n\r\n"
	usual := func() []hpack.HeaderField {
		return []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: harness.SiteName}, {Name: ":path", Value: "/h2"}}
	}
	with := func(fields ...string) []hpack.HeaderField {
		all := usual()
		for i := 0; i+1 < len(fields); i += 2 {
			if strings.HasPrefix(fields[i], "=") { // replaces a pseudo-header
				for j := range all {
					if all[j].Name == fields[i][1:] {
						all[j].Value = fields[i+1]
					}
				}
				continue
			}
			all = append(all, hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
		return all
	}
	cases := [][]hpack.HeaderField{
		with(), with("content-length", "5"), with("content-length", "0"), with("content-length", "4"), with("content-length", "6"), with("content-length", "+5"), with("content-length", "5, 5"),
		with("content-length", "5", "content-length", "5"), with("content-length", "5", "content-length", "6"), with("content-length", ""), with("content-length", "5\r\nx: y"),
		with("transfer-encoding", "chunked"), with("transfer-encoding", "identity"), with("Transfer-Encoding", "chunked"), with("transfer-encoding ", "chunked"), with("transfer_encoding", "chunked"),
		with("x", "y\r\ntransfer-encoding: chunked"), with("x", "y\r\n\r\n"+inner), with("x", "y\n\n"+inner), with("x", "y\rz"), with("x", "y\x00z"), with("x", " y"), with("x", "y "),
		with("x: y\r\ntransfer-encoding", "chunked"), with("x\r\n", "y"), with("x y", "z"), with("x:", "y"), with("X", "y"), with("", "y"), with("x\x00", "y"),
		with("connection", "close"), with("connection", "transfer-encoding"), with("upgrade", "h2c"), with("te", "gzip"), with("te", "trailers"), with("keep-alive", "x"), with("proxy-connection", "x"),
		with("host", "other.test"), with("host", harness.SiteName), with("cookie", "a=b\r\nx: y"), with("expect", "100-continue"), with(":path", "/other"), with(":other", "x"),
		with("=:path", "/h2 HTTP/1.1\r\nHost: a\r\n\r\n"+inner), with("=:path", "/h2 x"), with("=:path", "/h2\tx"), with("=:path", ""), with("=:path", "h2"), with("=:path", "*"), with("=:path", "https://other.test/h2"),
		with("=:path", "/h2\x00"), with("=:path", "/h2#f"), with("=:method", "POST /x HTTP/1.1\r\nHost: a\r\n\r\nGET"), with("=:method", "PO ST"), with("=:method", ""), with("=:method", "post"), with("=:method", "CONNECT"),
		with("=:authority", "site.test\r\nx: y"), with("=:authority", "a@site.test"), with("=:authority", "site.test x"), with("=:authority", ""), with("=:scheme", "https\r\nx: y"), with("=:scheme", "http"), with("=:scheme", ""),
		append([]hpack.HeaderField{{Name: "x", Value: "first"}}, usual()...),
	}
	var all []input
	for i, fields := range cases {
		name := fmt.Sprintf("downgrade/%d/%s=%q", i, fields[len(fields)-1].Name, fields[len(fields)-1].Value)
		all = append(all, input{name: name, http2: true, bytes: stream(fields, nil)})
	}
	for _, trailer := range []hpack.HeaderField{
		{Name: "x", Value: "y"}, {Name: "content-length", Value: "5"}, {Name: "transfer-encoding", Value: "chunked"}, {Name: ":path", Value: "/x"}, {Name: "host", Value: "a"},
		{Name: "x", Value: "y\r\n\r\n" + inner}, {Name: "x\r\ny", Value: "z"}, {Name: "X", Value: "y"},
	} {
		all = append(all, input{
			name: fmt.Sprintf("downgrade/trailer/%s=%q", trailer.Name, trailer.Value), http2: true,
			bytes: stream(usual(), []hpack.HeaderField{trailer}),
		})
	}
	return all
}

// stream is an HTTP/2 connection with one request with a body of 5 bytes, as it is
// given, however wrong.
func stream(fields, trailers []hpack.HeaderField) string {
	var out, block bytes.Buffer
	out.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&out, nil)
	framer.AllowIllegalWrites = true
	encoder := hpack.NewEncoder(&block)
	encode := func(fields []hpack.HeaderField) []byte {
		block.Reset()
		for _, field := range fields {
			_ = encoder.WriteField(field) // into memory
		}
		return block.Bytes()
	}
	_ = framer.WriteSettings()
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(fields), EndHeaders: true})
	_ = framer.WriteData(1, len(trailers) == 0, []byte("hello"))
	if len(trailers) > 0 {
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(trailers), EndHeaders: true, EndStream: true})
	}
	return out.String()
}
