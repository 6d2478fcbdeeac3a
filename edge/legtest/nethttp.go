package legtest

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/reseal/reseal/edge/exchange"
)

// outgoing is req in the words of edge/exchange.
func outgoing(req *http.Request, x *exchange.Exchange) (*exchange.Request, error) {
	if req.URL == nil {
		return nil, fmt.Errorf("a request without URL")
	}
	r := &exchange.Request{
		Method: req.Method, Scheme: "https", Authority: req.Host, Target: req.RequestURI, Length: req.ContentLength, Version: exchange.HTTP11,
		Continue: httpguts.HeaderValuesContainsToken(req.Header["Expect"], "100-continue"),
		Trailers: httpguts.HeaderValuesContainsToken(req.Header["Te"], "trailers"),
	}
	if r.Target == "" {
		r.Target = req.URL.RequestURI()
	}
	if r.Method == "" {
		r.Method = http.MethodGet
	}
	switch {
	case req.Body == nil || req.Body == http.NoBody:
		r.Length, r.Continue = 0, false
	case r.Length == 0 || len(req.Trailer) > 0:
		r.Length = exchange.UnknownLength
	}
	if httpguts.HeaderValuesContainsToken(req.Header["Connection"], "upgrade") {
		r.Protocol = req.Header.Get("Upgrade")
	}
	for name, values := range req.Header {
		switch kind := exchange.NameOf(name); {
		case kind == exchange.Host, kind == exchange.ContentLength, kind == exchange.Expect, kind.HopByHop():
			continue
		}
		for _, value := range values {
			r.Fields.Add(name, value)
		}
	}
	var announced []string
	for name := range req.Trailer {
		if exchange.TrailerAllowed(name) {
			announced = append(announced, name)
		}
	}
	if len(announced) > 0 {
		slices.Sort(announced)
		r.Fields.Add("Trailer", strings.Join(announced, ", "))
	}
	return r, nil
}

// fields are the fields of a trailer section.
func fields(trailer http.Header) exchange.Fields {
	var all exchange.Fields
	for name, values := range trailer {
		for _, value := range values {
			all.Add(name, value)
		}
	}
	return all
}

func header(fields exchange.Fields) http.Header {
	h := http.Header{}
	for _, field := range fields {
		h.Add(field.Name, field.Value)
	}
	return h
}

// response is what net/http makes of the head of an answer.
func (c *call) response(req *http.Request, method string, r *exchange.Response) *http.Response {
	h := header(r.Fields)
	response := &http.Response{
		Status: fmt.Sprintf("%d %s", r.Status, http.StatusText(r.Status)), StatusCode: r.Status, Header: h,
		Proto: r.Version.String(), ProtoMajor: 1, ProtoMinor: 1, ContentLength: r.Length, Request: req,
	}
	switch r.Version {
	case exchange.HTTP10:
		response.ProtoMinor = 0
	case exchange.HTTP2:
		response.ProtoMajor, response.ProtoMinor = 2, 0
	}
	if r.Length >= 0 {
		h.Set("Content-Length", fmt.Sprint(r.Length))
	}
	switch {
	case r.Status == http.StatusSwitchingProtocols:
		h.Set("Connection", "Upgrade")
		h.Set("Upgrade", r.Protocol)
		response.Body = (*tunnel)(c)
		return response
	case c.headEnds && method != http.MethodHead:
		response.ContentLength = max(response.ContentLength, 0)
	}
	for _, value := range h["Trailer"] {
		for name := range strings.SplitSeq(value, ",") {
			if response.Trailer == nil {
				response.Trailer = http.Header{}
			}
			response.Trailer[http.CanonicalHeaderKey(strings.TrimSpace(name))] = nil
		}
	}
	delete(h, "Trailer")
	response.Body = &body{call: c, response: response}
	return response
}

// body is the body of a response. At its end the response has its trailers.
type body struct {
	*call
	response *http.Response
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.call.Read(p)
	if err == io.EOF {
		for _, field := range b.trailers {
			if b.response.Trailer == nil {
				b.response.Trailer = http.Header{}
			}
			b.response.Trailer.Add(field.Name, field.Value)
		}
		b.trailers = nil
	}
	return n, err
}
