package http2

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// rule is a row of a table: what the peer sends and what the machine tells last.
type rule struct {
	name string
	w    *wire
	want string // the last event, or the error of the connection
}

const (
	end    = flagEndStream
	padded = flagPadded
)

func big(n int) string { return strings.Repeat("x", n) }

// TestServerRules: each rule of RFC 9113 that a client can break, and those by
// which what it sends is taken.
func TestServerRules(t *testing.T) {
	get := "Request 1 GET https://a.test/p [] length 0 end"
	rules := []rule{
		// 3.4: the preface.
		{"preface", fromClient(), "Settings 0"},
		{"not the preface", wireOf("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"), "GOAWAY PROTOCOL_ERROR"},
		{"no SETTINGS", wireOf(preface).frame(framePing, 0, 0, make([]byte, 8)...), "GOAWAY PROTOCOL_ERROR"},
		{"ack first", wireOf(preface).frame(frameSettings, flagAck, 0), "GOAWAY PROTOCOL_ERROR"},
		// 4: frames.
		{"too large a frame", fromClient().frame(framePing, 0, 0, make([]byte, minFrame+1)...), "GOAWAY FRAME_SIZE_ERROR"},
		{"unknown frame", fromClient().frame(0xbe, 0xff, 7, 1, 2, 3).request(1, end, "GET"), get},
		{"reserved bit", fromClient().request(1<<31|1, end, "GET"), get},
		// 4.3: header blocks.
		{"bad compression", fromClient().frame(frameHeaders, flagEndHeaders|end, 1, 0xff, 0xff, 0xff), "GOAWAY COMPRESSION_ERROR"},
		{"truncated block", fromClient().frame(frameHeaders, flagEndHeaders|end, 1, 0x41), "GOAWAY COMPRESSION_ERROR"},
		{"late table size", fromClient().frame(frameHeaders, flagEndHeaders|end, 1, 0x82, 0x20), "GOAWAY COMPRESSION_ERROR"},
		{"frame in a block", fromClient().frame(frameHeaders, 0, 1, 0x82).frame(framePing, 0, 0, make([]byte, 8)...), "GOAWAY PROTOCOL_ERROR"},
		{"unknown frame in a block", fromClient().frame(frameHeaders, 0, 1, 0x82).frame(0xbe, 0, 0), "GOAWAY PROTOCOL_ERROR"},
		{"block of another stream", fromClient().frame(frameHeaders, 0, 1, 0x82).frame(frameContinuation, flagEndHeaders, 3), "GOAWAY PROTOCOL_ERROR"},
		{"CONTINUATION alone", fromClient().frame(frameContinuation, flagEndHeaders, 1), "GOAWAY PROTOCOL_ERROR"},
		{"CONTINUATION", inPieces(fromClient(), 1, end, 3), get},
		{"endless block", endless(fromClient()), "GOAWAY ENHANCE_YOUR_CALM"},
		// 5.1: states.
		{"DATA on idle", fromClient().data(1, end, "x"), "GOAWAY PROTOCOL_ERROR"},
		{"RST_STREAM on idle", fromClient().frame(frameReset, 0, 1, 0, 0, 0, 8), "GOAWAY PROTOCOL_ERROR"},
		{"WINDOW_UPDATE on idle", fromClient().frame(frameWindowUpdate, 0, 1, 0, 0, 0, 8), "GOAWAY PROTOCOL_ERROR"},
		{"PRIORITY on idle", fromClient().frame(framePriority, 0, 1, 0, 0, 0, 0, 8).request(1, end, "GET"), get},
		{"DATA after the end", fromClient().request(1, end, "GET").data(1, 0, "x"), "Reset 1 STREAM_CLOSED ours"},
		{"HEADERS after the end", fromClient().request(1, end, "GET").request(1, end, "GET"), "Reset 1 STREAM_CLOSED ours"},
		{"DATA after RST_STREAM", fromClient().request(1, 0, "POST").frame(frameReset, 0, 1, 0, 0, 0, 8).data(1, 0, "x"), "Reset 1 STREAM_CLOSED ours"},
		{"DATA after ours", fromClient().request(1, 0, "POST", "te", "x").data(1, 0, "x").request(3, end, "GET"), strings.Replace(get, "1", "3", 1)},
		{"even stream", fromClient().request(2, end, "GET"), "GOAWAY PROTOCOL_ERROR"},
		{"stream passed over", fromClient().request(5, end, "GET").request(3, end, "GET"), "GOAWAY PROTOCOL_ERROR"},
		{"DATA on a stream passed over", fromClient().request(5, end, "GET").data(3, end, "x"), "GOAWAY PROTOCOL_ERROR"},
		{"on stream 0", fromClient().data(0, end, "x"), "GOAWAY PROTOCOL_ERROR"},
		{"HEADERS on stream 0", fromClient().frame(frameHeaders, flagEndHeaders, 0), "GOAWAY PROTOCOL_ERROR"},
		// 5.3: priorities mean nothing.
		{"depends on itself", fromClient().frame(frameHeaders, flagEndHeaders|flagPriority|end, 1, append([]byte{0, 0, 0, 1, 8}, new(wire).encode(":method", "GET")...)...), "Reset 1 PROTOCOL_ERROR ours"},
		{"length of PRIORITY", fromClient().request(1, end, "GET").frame(framePriority, 0, 1, 0, 0, 0, 3), "Reset 1 FRAME_SIZE_ERROR ours"},
		// 6.1, 6.2: padding.
		{"padded DATA", fromClient().request(1, 0, "POST").frame(frameData, padded|end, 1, 3, 'a', 'b', 0, 0, 0), `Data 1 "ab" end`},
		{"padding alone", fromClient().request(1, 0, "POST").frame(frameData, padded|end, 1, 3, 0, 0, 0), `Data 1 "" end`},
		{"too much padding", fromClient().request(1, 0, "POST").frame(frameData, padded, 1, 3, 0, 0), "GOAWAY PROTOCOL_ERROR"},
		{"no padding", fromClient().request(1, 0, "POST").frame(frameData, padded, 1), "GOAWAY FRAME_SIZE_ERROR"},
		{"too much padding of HEADERS", fromClient().frame(frameHeaders, padded|flagEndHeaders, 1, 3, 0x82, 0), "GOAWAY PROTOCOL_ERROR"},
		{"HEADERS without their padding", fromClient().frame(frameHeaders, padded|flagEndHeaders, 1), "GOAWAY FRAME_SIZE_ERROR"},
		{"HEADERS without their priority", fromClient().frame(frameHeaders, flagPriority|flagEndHeaders, 1, 0, 0), "GOAWAY FRAME_SIZE_ERROR"},
		// 6.4, 6.7, 6.8: lengths and streams.
		{"RST_STREAM", fromClient().request(1, end, "GET").frame(frameReset, 0, 1, 0, 0, 0, 8), "Reset 1 CANCEL"},
		{"length of RST_STREAM", fromClient().request(1, end, "GET").frame(frameReset, 0, 1, 0, 0, 8), "GOAWAY FRAME_SIZE_ERROR"},
		{"length of PING", fromClient().frame(framePing, 0, 0, 1, 2), "GOAWAY FRAME_SIZE_ERROR"},
		{"PING on a stream", fromClient().frame(framePing, 0, 1, make([]byte, 8)...), "GOAWAY PROTOCOL_ERROR"},
		{"GOAWAY", fromClient().frame(frameGoAway, 0, 0, append(uint32s(0, 2), "bye"...)...), `GoAway 0 INTERNAL_ERROR last 0 "bye"`},
		{"GOAWAY on a stream", fromClient().frame(frameGoAway, 0, 1, uint32s(0, 2)...), "GOAWAY PROTOCOL_ERROR"},
		{"GOAWAY takes more", fromClient().frame(frameGoAway, 0, 0, uint32s(0, 2)...).frame(frameGoAway, 0, 0, uint32s(2, 2)...), "GOAWAY PROTOCOL_ERROR"},
		{"short GOAWAY", fromClient().frame(frameGoAway, 0, 0, 0, 0, 0, 0), "GOAWAY FRAME_SIZE_ERROR"},
		// 6.5: SETTINGS.
		{"SETTINGS on a stream", fromClient().frame(frameSettings, 0, 1), "GOAWAY PROTOCOL_ERROR"},
		{"length of SETTINGS", fromClient().frame(frameSettings, 0, 0, 1), "GOAWAY FRAME_SIZE_ERROR"},
		{"ack with a payload", fromClient().frame(frameSettings, flagAck, 0, make([]byte, 6)...), "GOAWAY FRAME_SIZE_ERROR"},
		{"ack too many", fromClient().frame(frameSettings, flagAck, 0).frame(frameSettings, flagAck, 0), "GOAWAY PROTOCOL_ERROR"},
		{"ENABLE_PUSH 2", fromClient().setting(settingEnablePush, 2), "GOAWAY PROTOCOL_ERROR"},
		{"ENABLE_PUSH 1", fromClient().setting(settingEnablePush, 1), "Settings 0"},
		{"INITIAL_WINDOW_SIZE", fromClient().setting(settingInitialWindow, 1<<31), "GOAWAY FLOW_CONTROL_ERROR"},
		{"MAX_FRAME_SIZE small", fromClient().setting(settingMaxFrame, minFrame-1), "GOAWAY PROTOCOL_ERROR"},
		{"MAX_FRAME_SIZE large", fromClient().setting(settingMaxFrame, maxFrame+1), "GOAWAY PROTOCOL_ERROR"},
		{"ENABLE_CONNECT_PROTOCOL 2", fromClient().setting(settingExtendedConnect, 2), "GOAWAY PROTOCOL_ERROR"},
		{"ENABLE_CONNECT_PROTOCOL taken back", fromClient().setting(settingExtendedConnect, 1).setting(settingExtendedConnect, 0), "GOAWAY PROTOCOL_ERROR"},
		{"NO_RFC7540_PRIORITIES 2", wireOf(preface).setting(settingNoRFC7540Priority, 2), "GOAWAY PROTOCOL_ERROR"},
		{"NO_RFC7540_PRIORITIES changes", wireOf(preface).setting(settingNoRFC7540Priority, 1).setting(settingNoRFC7540Priority, 0), "GOAWAY PROTOCOL_ERROR"},
		{"NO_RFC7540_PRIORITIES said late", fromClient().setting(settingNoRFC7540Priority, 1), "GOAWAY PROTOCOL_ERROR"},
		{"unknown setting", fromClient().setting(0xbeef, 1), "Settings 0"},
		// 6.6: PUSH_PROMISE.
		{"PUSH_PROMISE", fromClient().frame(framePushPromise, flagEndHeaders, 1, 0, 0, 0, 2), "GOAWAY PROTOCOL_ERROR"},
		// 6.9: flow control.
		{"length of WINDOW_UPDATE", fromClient().frame(frameWindowUpdate, 0, 0, 1, 2, 3), "GOAWAY FRAME_SIZE_ERROR"},
		{"WINDOW_UPDATE 0", fromClient().frame(frameWindowUpdate, 0, 0, uint32s(0)...), "GOAWAY PROTOCOL_ERROR"},
		{"WINDOW_UPDATE 0 of a stream", fromClient().request(1, end, "GET").frame(frameWindowUpdate, 0, 1, uint32s(0)...), "Reset 1 PROTOCOL_ERROR ours"},
		{"too large a window", fromClient().frame(frameWindowUpdate, 0, 0, uint32s(maxWindow)...), "GOAWAY FLOW_CONTROL_ERROR"},
		{"too large a window of a stream", fromClient().request(1, end, "GET").frame(frameWindowUpdate, 0, 1, uint32s(maxWindow)...), "Reset 1 FLOW_CONTROL_ERROR ours"},
		{"too large a window by SETTINGS", fromClient().request(1, end, "GET").frame(frameWindowUpdate, 0, 1, uint32s(maxWindow-firstWindow)...).setting(settingInitialWindow, firstWindow+1), "GOAWAY FLOW_CONTROL_ERROR"},
		{"window opens", fromClient().setting(settingInitialWindow, 0).request(1, end, "GET").frame(frameWindowUpdate, 0, 1, uint32s(1)...), "Window 1"},
		{"beyond the stream's window", flood(fromClient().request(1, 0, "POST"), 1, 5), "Reset 1 FLOW_CONTROL_ERROR ours"},
		// 8.1: messages.
		{"trailers", fromClient().request(1, 0, "POST").data(1, 0, "x").head(1, end, "t", "1"), "Trailers 1 [{t 1 false}]"},
		{"trailers without an end", fromClient().request(1, 0, "POST").head(1, 0, "t", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"pseudo-header fields in trailers", fromClient().request(1, 0, "POST").head(1, end, ":method", "GET"), "Reset 1 PROTOCOL_ERROR ours"},
		{"Connection in trailers", fromClient().request(1, 0, "POST").head(1, end, "connection", "x"), "Reset 1 PROTOCOL_ERROR ours"},
		{"too large trailers", fromClient().request(1, 0, "POST").head(1, end, many(101)...), "Reset 1 PROTOCOL_ERROR ours"},
		{"empty DATA ends", fromClient().request(1, 0, "POST").data(1, end, ""), `Data 1 "" end`},
		// 8.1.1: Content-Length.
		{"length", fromClient().request(1, 0, "POST", "content-length", "2").data(1, end, "ab"), `Data 1 "ab" end`},
		{"too long", fromClient().request(1, 0, "POST", "content-length", "1").data(1, 0, "ab"), "Reset 1 PROTOCOL_ERROR ours"},
		{"too short", fromClient().request(1, 0, "POST", "content-length", "3").data(1, end, "ab"), "Reset 1 PROTOCOL_ERROR ours"},
		{"too short with trailers", fromClient().request(1, 0, "POST", "content-length", "3").data(1, 0, "ab").head(1, end, "t", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"too short with nothing", fromClient().request(1, end, "POST", "content-length", "3"), "Reset 1 PROTOCOL_ERROR ours"},
		{"two lengths", fromClient().request(1, 0, "POST", "content-length", "3", "content-length", "3"), "Reset 1 PROTOCOL_ERROR ours"},
		{"a list of lengths", fromClient().request(1, 0, "POST", "content-length", "3, 3"), "Reset 1 PROTOCOL_ERROR ours"},
		{"signed length", fromClient().request(1, 0, "POST", "content-length", "+3"), "Reset 1 PROTOCOL_ERROR ours"},
		// 8.2: fields.
		{"upper case", fromClient().request(1, end, "GET", "X-a", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"space in a name", fromClient().request(1, end, "GET", "x a", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"colon in a name", fromClient().request(1, end, "GET", "x:a", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"empty name", fromClient().request(1, end, "GET", "", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"CR in a value", fromClient().request(1, end, "GET", "a", "1\r\nb: 2"), "Reset 1 PROTOCOL_ERROR ours"},
		{"NUL in a value", fromClient().request(1, end, "GET", "a", "1\x00"), "Reset 1 PROTOCOL_ERROR ours"},
		{"control in a value", fromClient().request(1, end, "GET", "a", "1\x01"), "Reset 1 PROTOCOL_ERROR ours"},
		{"control in a value of the table", fromClient().request(1, end, "GET", "a", "1\x01").request(3, end, "GET", "a", "1\x01"), "Reset 3 PROTOCOL_ERROR ours"},
		{"upper case in the table", fromClient().request(1, end, "GET", "A", "1").request(3, end, "GET", "A", "1"), "Reset 3 PROTOCOL_ERROR ours"},
		{"control in a path of the table", at("/\x01").head(3, end, ":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/\x01"), "Reset 3 PROTOCOL_ERROR ours"},
		{"space at the end", fromClient().request(1, end, "GET", "a", "1 "), "Reset 1 PROTOCOL_ERROR ours"},
		{"tab in a value", fromClient().request(1, end, "GET", "a", "1\t2"), "Request 1 GET https://a.test/p [{a 1\t2 false}] length 0 end"},
		{"cookies", fromClient().request(1, end, "GET", "cookie", "a=1", "x", "", "cookie", "b=2", "cookie", "c=3"), "Request 1 GET https://a.test/p [{cookie a=1; b=2; c=3 false} {x  false}] length 0 end"},
		{"TE", fromClient().request(1, end, "GET", "te", "trailers"), "Request 1 GET https://a.test/p [] length 0 trailers end"},
		{"another TE", fromClient().request(1, end, "GET", "te", "gzip"), "Reset 1 PROTOCOL_ERROR ours"},
		// 8.3: pseudo-header fields.
		{"late", fromClient().head(1, end, ":method", "GET", ":scheme", "https", "a", "1", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"twice", fromClient().request(1, end, "GET", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"unknown", fromClient().head(1, end, ":method", "GET", ":new", "https"), "Reset 1 PROTOCOL_ERROR ours"},
		{"of responses", fromClient().head(1, end, ":method", "GET", ":status", "200"), "Reset 1 PROTOCOL_ERROR ours"},
		{"no method", fromClient().head(1, end, ":scheme", "https", ":authority", "a.test", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"bad method", fromClient().request(1, end, "GET /"), "Reset 1 PROTOCOL_ERROR ours"},
		{"no scheme", fromClient().head(1, end, ":method", "GET", ":authority", "a.test", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"another scheme", fromClient().head(1, end, ":method", "GET", ":scheme", "ftp", ":authority", "a.test", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"no path", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":authority", "a.test"), "Reset 1 PROTOCOL_ERROR ours"},
		{"relative path", at("p"), "Reset 1 PROTOCOL_ERROR ours"},
		{"absolute form", at("https://b.test/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"space in a path", at("/a b"), "Reset 1 PROTOCOL_ERROR ours"},
		{"line in a path", at("/a HTTP/1.1\r\nx: y"), "Reset 1 PROTOCOL_ERROR ours"},
		{"fragment", at("/a#b"), "Reset 1 PROTOCOL_ERROR ours"},
		{"asterisk", fromClient().head(1, end, ":method", "OPTIONS", ":scheme", "https", ":authority", "a.test", ":path", "*"), "Request 1 OPTIONS https://a.test* [] length 0 end"},
		{"asterisk with GET", at("*"), "Reset 1 PROTOCOL_ERROR ours"},
		{"no authority", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"user information", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":authority", "u@a.test", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"path in the authority", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":authority", "a.test/x", ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"Host alone", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":path", "/p", "host", "a.test"), get},
		{"Host too", fromClient().request(1, end, "GET", "host", "A.test"), get},
		{"another Host", fromClient().request(1, end, "GET", "host", "b.test"), "Refused 1 GET https://a.test/p [] length 0 400 bad_host end"},
		{"Host with the port", fromClient().request(1, end, "GET", "host", "a.test:443"), get},
		{"no host", fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":authority", "a_*.test", ":path", "/p"), "Refused 1 GET https://a_*.test/p [] length 0 400 bad_host end"},
		{"bad escape", at("/%zz"), "Reset 1 PROTOCOL_ERROR ours"},
		{"authentication at a proxy", fromClient().request(1, end, "GET", "proxy-authorization", "x"), get},
		{"two Hosts", fromClient().request(1, end, "GET", "host", "a.test", "host", "a.test"), "Reset 1 PROTOCOL_ERROR ours"},
		{"Expect", fromClient().request(1, 0, "POST", "expect", "100-continue"), "Request 1 POST https://a.test/p [] length -1 continue"},
		{"another Expect", fromClient().request(1, 0, "POST", "expect", "more"), "Refused 1 POST https://a.test/p [] length -1 continue 417 bad_request"},
		// 8.5, RFC 8441: CONNECT.
		{"CONNECT", fromClient().head(1, 0, ":method", "CONNECT", ":authority", "a.test:443"), "Refused 1 CONNECT ://a.test:443 [] length -1 405 method_not_allowed"},
		{"content of a CONNECT", fromClient().head(1, 0, ":method", "CONNECT", ":authority", "a.test:443").data(1, 0, "x").data(1, end, ""), "Refused 1 CONNECT ://a.test:443 [] length -1 405 method_not_allowed"},
		{"CONNECT with a path", fromClient().request(1, 0, "CONNECT"), "Reset 1 PROTOCOL_ERROR ours"},
		{"CONNECT with a length", fromClient().head(1, 0, ":method", "CONNECT", ":authority", "a.test", "content-length", "3"), "Reset 1 PROTOCOL_ERROR ours"},
		{"extended CONNECT", fromClient().request(1, 0, "CONNECT", ":protocol", "websocket"), "Request 1 CONNECT https://a.test/p [] length -1 to websocket"},
		{"trailers in a tunnel", fromClient().request(1, 0, "CONNECT", ":protocol", "websocket").head(1, end, "t", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{":protocol with GET", fromClient().request(1, 0, "GET", ":protocol", "websocket"), "Reset 1 PROTOCOL_ERROR ours"},
		// 10.5.1: sizes.
		{"too many fields", fromClient().request(1, end, "GET", many(101)...), "Refused"},
		{"many fields", fromClient().request(1, end, "GET", many(100)...), "Request"},
		{"many cookies", fromClient().request(1, end, "GET", slices.Repeat([]string{"cookie", "a=1"}, 150)...), "Request"},
		{"too large", inPieces(fromClient(), 1, end, 9000, "a", big(20000), "b", big(20000), "c", big(30000)), "Refused"},
		// RFC 9218: priorities.
		{"priority", fromClient().request(1, end, "GET", "priority", "u=1, i"), "Request 1 GET https://a.test/p [{priority u=1, i false}] length 0 {1 true} end"},
		{"PRIORITY_UPDATE", fromClient().request(1, end, "GET").frame(framePriorityUpdate, 0, 0, append(uint32s(1), "u=5"...)...), "Reprioritized 1 {5 false}"},
		{"PRIORITY_UPDATE before", fromClient().frame(framePriorityUpdate, 0, 0, append(uint32s(1), "u=5"...)...).request(1, end, "GET"), strings.Replace(get, " end", " {5 false} end", 1)},
		{"PRIORITY_UPDATE on a stream", fromClient().frame(framePriorityUpdate, 0, 1, uint32s(1)...), "GOAWAY PROTOCOL_ERROR"},
		{"PRIORITY_UPDATE of a push", fromClient().frame(framePriorityUpdate, 0, 0, uint32s(2)...), "GOAWAY PROTOCOL_ERROR"},
		{"short PRIORITY_UPDATE", fromClient().frame(framePriorityUpdate, 0, 0, 0, 0, 1), "GOAWAY FRAME_SIZE_ERROR"},
	}
	for _, name := range []string{"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings"} {
		rules = append(rules, rule{name, fromClient().request(1, end, "GET", name, "x"), "Reset 1 PROTOCOL_ERROR ours"})
	}
	check(t, rules, func() *Conn { return NewServer(Config{ExtendedConnect: true, MaxStreams: 4}) })
}

// TestClientRules: those that a server can break. Streams 1 (GET), 3 (HEAD), 5
// (POST, not ended) and 7 (a tunnel) are open.
func TestClientRules(t *testing.T) {
	server := func() *wire { return new(wire).setting(settingExtendedConnect, 1) }
	ok := func(stream uint32, fields ...string) *wire {
		return server().head(stream, 0, append([]string{":status", "200"}, fields...)...)
	}
	check(t, []rule{
		{"SETTINGS", server(), "Settings 0"},
		{"no SETTINGS", new(wire).frame(framePing, 0, 0, make([]byte, 8)...), "GOAWAY PROTOCOL_ERROR"},
		{"ENABLE_PUSH 1", server().setting(settingEnablePush, 1), "GOAWAY PROTOCOL_ERROR"},
		{"PUSH_PROMISE", server().frame(framePushPromise, flagEndHeaders, 1, 0, 0, 0, 2), "GOAWAY PROTOCOL_ERROR"},
		{"PRIORITY_UPDATE", server().frame(framePriorityUpdate, 0, 0, uint32s(1)...), "GOAWAY PROTOCOL_ERROR"},
		{"response", ok(1, "a", "1", "content-length", "3"), "Response 1 200 [{a 1 false}] length 3"},
		{"response that ends", server().head(1, end, ":status", "200"), "Response 1 200 [] length -1 end"},
		{"stream not opened", ok(9), "GOAWAY PROTOCOL_ERROR"},
		{"stream of the server", ok(2), "GOAWAY PROTOCOL_ERROR"},
		{"DATA first", server().data(1, end, "x"), "Reset 1 PROTOCOL_ERROR ours"},
		{"DATA after the end", server().head(1, end, ":status", "200").data(1, end, "x"), "GOAWAY STREAM_CLOSED"},
		{"DATA after the end of an upload", server().head(5, end, ":status", "200").data(5, end, "x"), "Reset 5 STREAM_CLOSED ours"},
		{"HEADERS after the end", server().head(1, end, ":status", "200").head(1, end, ":status", "200"), "GOAWAY STREAM_CLOSED"},
		{"no status", server().head(1, end, "a", "1"), "Reset 1 PROTOCOL_ERROR ours"},
		{"two statuses", ok(1, ":status", "200"), "Reset 1 PROTOCOL_ERROR ours"},
		{"short status", server().head(1, end, ":status", "20"), "Reset 1 PROTOCOL_ERROR ours"},
		{"status 099", server().head(1, end, ":status", "099"), "Reset 1 PROTOCOL_ERROR ours"},
		{"status 2x0", server().head(1, end, ":status", "2x0"), "Reset 1 PROTOCOL_ERROR ours"},
		{"status 999", server().head(1, end, ":status", "999"), "Response 1 999 [] length -1 end"},
		{":path", ok(1, ":path", "/"), "Reset 1 PROTOCOL_ERROR ours"},
		{"TE", ok(1, "te", "trailers"), "Reset 1 PROTOCOL_ERROR ours"},
		{"Connection", ok(1, "connection", "close"), "Reset 1 PROTOCOL_ERROR ours"},
		{"Host is a field like others", ok(1, "host", "x"), "Response 1 200 [{host x false}] length -1"},
		{"line in a value", ok(1, "a", "1\r\nset-cookie: x"), "Reset 1 PROTOCOL_ERROR ours"},
		{"early hints", server().head(1, 0, ":status", "103", "link", "x"), "Informational 1 103 [{link x false}] length -1"},
		{"early end", server().head(1, end, ":status", "103"), "Reset 1 PROTOCOL_ERROR ours"},
		{"101", server().head(1, 0, ":status", "101"), "Reset 1 PROTOCOL_ERROR ours"},
		{"100, then 200", server().head(5, 0, ":status", "100").head(5, 0, ":status", "200"), "Response 5 200 [] length -1"},
		{"endless hints", repeat(server(), 101, func(w *wire) { w.head(1, 0, ":status", "103") }), "Reset 1 ENHANCE_YOUR_CALM ours"},
		{"DATA after hints", server().head(1, 0, ":status", "103").data(1, end, "x"), "Reset 1 PROTOCOL_ERROR ours"},
		{"second response", ok(1).head(1, 0, ":status", "200"), "Reset 1 PROTOCOL_ERROR ours"},
		{"trailers", ok(1).data(1, 0, "x").head(1, end, "grpc-status", "0"), "Trailers 1 [{grpc-status 0 false}]"},
		{"trailers with a status", ok(1).head(1, end, ":status", "200"), "Reset 1 PROTOCOL_ERROR ours"},
		{"length", ok(1, "content-length", "2").data(1, end, "ab"), `Data 1 "ab" end`},
		{"too long", ok(1, "content-length", "1").data(1, end, "ab"), "Reset 1 PROTOCOL_ERROR ours"},
		{"too short", ok(1, "content-length", "3").data(1, end, "ab"), "Reset 1 PROTOCOL_ERROR ours"},
		{"nothing at all", server().head(1, end, ":status", "200", "content-length", "3"), "Reset 1 PROTOCOL_ERROR ours"},
		{"HEAD", server().head(3, end, ":status", "200", "content-length", "3"), "Response 3 200 [] length 3 end"},
		{"HEAD that ends later", ok(3, "content-length", "3").data(3, end, ""), `Data 3 "" end`},
		{"HEAD with content", ok(3, "content-length", "3").data(3, end, "abc"), "Reset 3 PROTOCOL_ERROR ours"},
		{"204", server().head(1, 0, ":status", "204").data(1, end, ""), `Data 1 "" end`},
		{"204 with content", server().head(1, 0, ":status", "204").data(1, end, "x"), "Reset 1 PROTOCOL_ERROR ours"},
		{"304", server().head(1, end, ":status", "304", "content-length", "3"), "Response 1 304 [] length 3 end"},
		{"304 with content", server().head(1, 0, ":status", "304", "content-length", "3").data(1, end, "abc"), "Reset 1 PROTOCOL_ERROR ours"},
		{"tunnel", ok(7, "content-length", "3").data(7, 0, "abcd"), `Data 7 "abcd"`},
		{"tunnel with trailers", ok(7).head(7, end, "t", "1"), "Reset 7 PROTOCOL_ERROR ours"},
		{"tunnel refused", server().head(7, 0, ":status", "403", "content-length", "1").data(7, 0, "x").head(7, end, "t", "1"), "Trailers 7 [{t 1 false}]"},
		{"reset", server().frame(frameReset, 0, 1, uint32s(8)...), "Reset 1 CANCEL"},
		{"refused", server().frame(frameReset, 0, 1, uint32s(7)...), "Reset 1 REFUSED_STREAM unprocessed"},
		{"refused after a response", ok(1).frame(frameReset, 0, 1, uint32s(7)...), "Reset 1 REFUSED_STREAM"},
		{"GOAWAY", server().frame(frameGoAway, 0, 0, uint32s(5, 0)...), "Reset 7 REFUSED_STREAM unprocessed"},
		{"GOAWAY after a part of the response", ok(7).frame(frameGoAway, 0, 0, uint32s(5, 0)...), "Reset 7 REFUSED_STREAM"},
		{"refused after hints", server().head(1, 0, ":status", "103").frame(frameReset, 0, 1, uint32s(7)...), "Reset 1 REFUSED_STREAM"},
		{"GOAWAY of none", server().frame(frameGoAway, 0, 0, uint32s(0, 0)...), "Reset 1 REFUSED_STREAM unprocessed"},
		{"GOAWAY takes all", server().frame(frameGoAway, 0, 0, uint32s(maxStream, 0)...), `GoAway 0 NO_ERROR last 2147483647 ""`},
		{"too many fields", ok(1, many(101)...), "Reset 1 PROTOCOL_ERROR ours"},
		{"beyond the stream's window", flood(ok(1), 1, 5), "Reset 1 FLOW_CONTROL_ERROR ours"},
		{"beyond the connection's window", flood(flood(flood(ok(1), 1, 4).head(5, 0, ":status", "200"), 5, 4).head(7, 0, ":status", "200"), 7, 1), "GOAWAY FLOW_CONTROL_ERROR"},
	}, func() *Conn {
		c := NewClient(Config{ConnWindow: 2 * firstWindow})
		f := feeder{c: c}
		f.feed(new(wire).setting(settingExtendedConnect, 1).Bytes())
		for i, method := range []string{"GET", "HEAD", "POST", "GET"} {
			r := exchange.Request{Method: method, Scheme: "https", Authority: "a.test", Target: "/", Length: exchange.UnknownLength}
			if i == 3 {
				r.Protocol = "websocket"
			}
			if _, _, err := c.AppendRequest(nil, &r, i < 2); err != nil {
				t.Fatal(err)
			}
		}
		// As if nothing had come: the table brings the server's SETTINGS.
		c.settled, c.peer = false, defaultSettings
		return c
	})
}

// check feeds each row in one go, byte by byte, and in two parts at each place,
// and compares.
func check(t *testing.T, rules []rule, newConn func() *Conn) {
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			whole := feeder{c: newConn()}
			whole.c.AppendPending(nil)
			whole.feed(r.w.Bytes())
			last := ""
			if n := len(whole.events); n > 0 {
				last = whole.events[n-1]
			}
			if kind, _, _ := strings.Cut(last, " "); last != r.want && kind != r.want {
				t.Fatalf("%.500s\nwant %s\n%v", last, r.want, whole.err)
			}
			answered(t, &whole)
			splitEverywhere(t, r.w.Bytes(), whole.events, newConn)
		})
	}
}

// answered checks that what is wrong is answered on the wire.
func answered(t *testing.T, f *feeder) {
	t.Helper()
	sent := frames(t, f.c.AppendPending(nil))
	for _, event := range f.events {
		var stream uint32
		if text, ok := strings.CutSuffix(event, " ours"); ok {
			var code string
			_, _ = fmt.Sscanf(text, "Reset %d %s", &stream, &code)
			event = fmt.Sprintf("RST_STREAM %d %s", stream, code)
		} else if !strings.HasPrefix(event, "GOAWAY") {
			continue
		}
		if !slices.Contains(sent, event) {
			t.Errorf("%s is missing in %q", event, sent)
		}
	}
}

// splitEverywhere: events don't depend on how bytes come.
func splitEverywhere(t *testing.T, input []byte, want []string, newConn func() *Conn) {
	t.Helper()
	step := 1
	if len(input) > 20000 {
		step = 1009
	}
	single := feeder{c: newConn()}
	for part := range slices.Chunk(input, step) {
		single.feed(part)
	}
	if !slices.Equal(single.events, want) {
		t.Errorf("by %d: %q\nwant %q", step, single.events, want)
	}
	if len(input) > 2000 {
		return
	}
	for i := 1; i < len(input); i++ {
		two := feeder{c: newConn()}
		two.feed(input[:i])
		two.feed(input[i:])
		if !slices.Equal(two.events, want) {
			t.Fatalf("split at %d: %q\nwant %q", i, two.events, want)
		}
	}
}

func wireOf(text string) *wire {
	w := new(wire)
	w.WriteString(text)
	return w
}

func at(path string) *wire {
	return fromClient().head(1, end, ":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", path)
}

func many(n int) (fields []string) {
	for i := range n {
		fields = append(fields, fmt.Sprintf("x-%d", i), "v")
	}
	return fields
}

// inPieces sends the head of a GET in frames of size bytes.
func inPieces(w *wire, stream uint32, flags uint8, size int, fields ...string) *wire {
	block := w.encode(append([]string{":method", "GET", ":scheme", "https", ":authority", "a.test", ":path", "/p"}, fields...)...)
	kind := frameHeaders
	for ; len(block) > size; block = block[size:] {
		w.frame(kind, flags, stream, block[:size]...)
		kind, flags = frameContinuation, 0
	}
	return w.frame(kind, flags|flagEndHeaders, stream, block...)
}

func endless(w *wire) *wire {
	w.frame(frameHeaders, 0, 1, 0x82)
	return repeat(w, 9, func(w *wire) { w.frame(frameContinuation, 0, 1, make([]byte, minFrame)...) })
}

// flood sends n full frames.
func flood(w *wire, stream uint32, n int) *wire {
	return repeat(w, n, func(w *wire) { w.data(stream, 0, big(minFrame-1)) })
}

func repeat(w *wire, n int, do func(*wire)) *wire {
	for range n {
		do(w)
	}
	return w
}
