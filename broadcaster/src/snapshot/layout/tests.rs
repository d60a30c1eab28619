use super::*;

fn span(name: &str, dtype: Dtype, shape: &[u64], start: usize) -> TensorSpan {
    let bytes = shape.iter().product::<u64>() * dtype.bytes();
    TensorSpan {
        parameter: Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype,
            stage: 0,
        },
        range: start..start + bytes as usize,
    }
}

/// Three tensors behind a header of 200 bytes, not in the order of their names.
fn spans() -> [TensorSpan; 3] {
    [
        span("b.weight", Dtype::F32, &[4, 8], 200),
        span("c.weight", Dtype::Bf16, &[10], 328),
        span("a.\"é\"", Dtype::F16, &[3], 348),
    ]
}

/// Size of the file that holds these.
fn bytes_of(spans: &[TensorSpan]) -> u64 {
    weight_file(spans, 1, 1).bytes()
}

#[test]
fn files_and_index_are_those_written_out_by_hand() {
    let first = weight_file(&spans()[..2], 1, 2);
    let header = r#"{"__metadata__":{"format":"pt"},"b.weight":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]},"c.weight":{"dtype":"BF16","shape":[10],"data_offsets":[128,148]}}      "#;
    assert_eq!(header.len() % 8, 0);
    assert_eq!(first.head[..8], (header.len() as u64).to_le_bytes());
    assert_eq!(std::str::from_utf8(&first.head[8..]).unwrap(), header);
    assert_eq!((first.data.clone(), first.tensors), (200..348, 2));
    let second = weight_file(&spans()[2..], 2, 2);
    assert_eq!(second.name, "model-00002-of-00002.safetensors");
    assert_eq!(second.data, 348..354);
    let index = index(&[first, second], &spans()).unwrap();
    let expected = r#"{
  "metadata": {
    "total_size": 154
  },
  "weight_map": {
    "a.\"é\"": "model-00002-of-00002.safetensors",
    "b.weight": "model-00001-of-00002.safetensors",
    "c.weight": "model-00001-of-00002.safetensors"
  }
}
"#;
    assert_eq!(String::from_utf8(index).unwrap(), expected);
}

#[test]
fn a_file_is_filled_to_the_last_byte_and_not_beyond() {
    let spans = spans();
    let all = bytes_of(&spans);
    assert_eq!(cut(&spans, all), [3]);
    assert_eq!(cut(&spans, all - 1), [2, 1]);
    let two = bytes_of(&spans[..2]);
    assert_eq!(cut(&spans, two), [2, 1]);
    assert_eq!(cut(&spans, two - 1), [1, 2]);
}

#[test]
fn a_tensor_larger_than_a_file_may_be_has_a_file_of_its_own() {
    let spans = [
        span("a", Dtype::F32, &[2], 0),
        span("b", Dtype::F32, &[500], 8),
        span("c", Dtype::F32, &[2], 2_008),
        span("d", Dtype::F32, &[2], 2_016),
    ];
    assert_eq!(cut(&spans, 1_000), [1, 1, 2]);
    assert_eq!(cut(&spans, 0), [1, 1, 1, 1]);
    assert_eq!(cut(&spans[1..2], 1), [1]);
}

#[test]
fn what_the_headers_say_is_what_the_library_reads_back() {
    let file = weight_file(&spans(), 1, 1);
    let read =
        crate::version::state::header_spans(&file.head[8..], file.data.end - file.data.start);
    let read = read.unwrap();
    let names: Vec<&str> = read.iter().map(|s| s.parameter.name.as_str()).collect();
    assert_eq!(names, ["a.\"é\"", "b.weight", "c.weight"]);
    assert_eq!(read[1].range.start, file.head.len());
}
